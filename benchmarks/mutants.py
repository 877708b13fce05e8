"""Whether the tests notice wrong code: each line of `mutant_table` is changed in a copy, and its few tests are run.

The tests named there first run on the unchanged copy, where they must pass. What no test notices is named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import main
from benchmarks.mutant_table import Mutant, mutants
from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError, LladaError
from llada_megatron.parallel import device
from llada_megatron.tools.bench import Claim, at_least, reported

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "benchmarks", "configs", "docs", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
GOAL = 95.0
"""Per cent of the mutants that a test notices."""
_PASSED, _TIMED_OUT = 0, -1
_UNCHANGED_S = 600.0
"""Seconds that tests of unchanged code have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which mutants, and how long each may take."""
    parser.add_argument(
        "--only", metavar="A,B,…", default="", help="only mutants whose area or file contains one of these"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="a test that takes longer notices (%(default)s)")


def run(args: argparse.Namespace) -> list[Claim]:
    """One claim over all mutants, and a figure for each area.

    Raises:
        ConfigError: there is no such mutant.
        LladaError: tests fail without any mutant, or a line of the table has changed.
    """
    words = args.only.split(",")
    chosen = [each for each in mutants() if any(word in f"{each.area} {each.file}" for word in words)]
    if not chosen:
        raise ConfigError(f"--only {args.only}: no mutant has this in its area or file")
    with _copy() as root:
        changed = [str(each) for each in chosen if _path(root, each).read_text().count(each.old) != 1]
        if changed:
            raise LladaError(f"not found once in its file: {'; '.join(changed)}")
        noticed = []
        for number, each in enumerate(chosen):
            if number == 0 or each.tests != chosen[number - 1].tests:
                _require_passed(root, each.tests)
            noticed.append(_notices(root, each, args.seconds))
    claims = [at_least("mutants that a test notices", 100 * sum(noticed) / len(chosen), "%", GOAL)]
    for area in dict.fromkeys(each.area for each in chosen):
        found = [seen for each, seen in zip(chosen, noticed, strict=True) if each.area == area]
        claims.append(reported(f"{area}: noticed of {len(found)}", sum(found), ""))
    return claims


def _require_passed(root: Path, tests: Sequence[str]) -> None:
    """Raises LladaError: the tests do not pass without a mutant."""
    if _run_tests(root, tests, _UNCHANGED_S) != _PASSED:
        raise LladaError(f"without a mutant these do not pass: {' '.join(tests)}")


def _notices(root: Path, mutant: Mutant, seconds: float) -> bool:
    """Whether a test fails, or does not end, with the mutant in place."""
    path, began = _path(root, mutant), time.monotonic()
    before = path.read_text()
    path.write_text(before.replace(mutant.old, mutant.new))
    try:
        seen = _run_tests(root, mutant.tests, seconds) != _PASSED
    finally:
        path.write_text(before)
    message(f"{'noticed ' if seen else 'SURVIVED'} {time.monotonic() - began:5.1f} s  {mutant}")
    return seen


def _path(root: Path, mutant: Mutant) -> Path:
    return root / "src/llada_megatron" / mutant.file


@contextlib.contextmanager
def _copy() -> Iterator[Path]:
    """A copy of what the tests need, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="llada-mutants-") as directory:
        for name in COPIED:
            source, target = ROOT / name, Path(directory, name)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(directory)


def _run_tests(root: Path, tests: Sequence[str], seconds: float) -> int:
    """The exit code of pytest on the copy, up to the first failure; -1 if it takes longer than that.

    A forked process, so that torch and Megatron are imported once only.
    """
    import pytest  # noqa: F401

    import llada_megatron.parallel.preload  # noqa: F401 - torch and Megatron

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(_in_copy(root, tests))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _TIMED_OUT


def _in_copy(root: Path, tests: Sequence[str]) -> int:
    """Run pytest with the copy's package in place of this one, and without its output."""
    import pytest

    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    os.chdir(root)
    # no compiled files: two mutants of a file within a second would have equal times
    os.environ |= {"PYTHONPATH": f"{root / 'src'}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    ours = [name for name in sys.modules if name.split(".")[0] in ("llada_megatron", "benchmarks", "tests")]
    for name in ours:
        if name != device.__name__:  # it knows that Megatron is installed, and is no mutant's
            del sys.modules[name]
    sys.path[:] = [str(root / "src"), str(root), *(entry for entry in sys.path if Path(entry or ".") != ROOT)]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


if __name__ == "__main__":
    sys.exit(main("mutants", sys.modules[__name__]))
