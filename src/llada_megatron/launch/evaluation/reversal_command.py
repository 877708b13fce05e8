"""`llada eval reversal`: does a model that was trained on "A is B" know "B is A"? Diffusion against autoregression.

Made-up facts are written, models are trained on them, and asked; each result is on the disk when it is known, and the
same command goes on behind it. The protocol is in `llada_moe.evaluation.reversal_facts` and docs/reversal.md.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.evaluation.reversal_picture import draw_reversal
from llada_megatron.launch.evaluation.reversal_training import ReversalRecipe, arm_of_seed
from llada_megatron.launch.files import replace
from llada_megatron.launch.ranks.rank import available_cores
from llada_megatron.launch.run_lock import RunLock
from llada_megatron.llada_moe.errors import ConfigError, DataError, ResourceError
from llada_megatron.llada_moe.evaluation.reversal_figures import (
    ARMS,
    ROWS,
    SeedFigures,
    counting,
    over_seeds,
    reversal_claims,
    seed_figures,
)
from llada_megatron.parallel.parent_death import die_with_parent

if TYPE_CHECKING:
    from llada_megatron.llada_moe.evaluation.reversal_figures import Found, ReversalClaim

SEEDS = 5
_Job = tuple[ReversalRecipe, str, int, Path]
PROTOCOL, PICTURE = "protocol.json", "reversal.svg"
_VERSION = 1
"""Of what is asked and how: figures of two versions cannot be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval reversal`."""
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"facts and models of N seeds ({SEEDS})")
    parser.add_argument(
        "--output", default="runs/reversal", metavar="FOLDER", help="models and results (runs/reversal); goes on there"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="models that are trained at the same time (one a core, at most 4)"
    )
    parser.add_argument("--require", action="store_true", help="exit with 1 if a figure misses its goal")


def run(args: argparse.Namespace) -> int:
    """Train what is not trained, ask, and report; raises ConfigError, DataError or ResourceError."""
    processes = min(4, available_cores()) if args.processes is None else args.processes
    for name, value in (("seeds", args.seeds), ("processes", processes)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    return measure(ReversalRecipe(), args.seeds, Path(args.output), processes, args.json, args.require)


def measure(
    recipe: ReversalRecipe,
    seeds: int,
    output: Path,
    processes: int = 1,
    as_json: bool = False,
    require: bool = False,
) -> int:
    """All models of so many seeds; returns the exit code.

    Raises:
        ConfigError: the folder holds something else.
        ResourceError: the disk is full, or another process works there.
    """
    _check_folder(output, recipe)
    with _no_space(output), RunLock.take(output):
        replace(output / PROTOCOL, json.dumps(_protocol(recipe), indent=1) + "\n")
        models = [(recipe, arm, seed, output) for seed in range(seeds) for arm in ARMS]
        _answer([each for each in models if not _file(output, *each[1:3]).is_file()], processes)
        found = {arm: {seed: _figures(_file(output, arm, seed)) for seed in range(seeds)} for arm in ARMS}
        claims = reversal_claims(found, recipe.pairs)
        print(_table(found), end="\n\n")
        print(_claim_table(claims), flush=True)
        drawn = draw_reversal(output / PICTURE, found, 100.0 / recipe.pairs)
    message(f"the picture is in {output / PICTURE}" if drawn else "no picture: matplotlib is not installed")
    if as_json:
        emit_json({"protocol": _protocol(recipe), "seeds": seeds, "claims": [claim.to_dict() for claim in claims]})
    return 1 if require and any(claim.holds is False for claim in claims) else 0


def _file(output: Path, arm: str, seed: int) -> Path:
    """Where the answers of a model are."""
    return output / f"seed-{seed}" / f"{arm.replace(' ', '-')}.json"


def _answer(missing: Sequence[_Job], processes: int) -> None:
    """Train and ask models, several at a time, each in a process of its own."""
    if processes == 1 or len(missing) < 2:
        for job in missing:
            _answer_one(job)
        return
    executor = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (os.getpid(),))
    try:
        for done in as_completed([executor.submit(_answer_one, job) for job in missing]):
            done.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that trained a model died (out of memory?); give the same command, which goes on, with fewer "
            "--processes"
        ) from error
    except BaseException:  # what others have not finished is begun anew by the next command
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """A process that ends with its parent, which Ctrl-C is for."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answer_one(job: _Job) -> None:
    """Train and ask a model, and write its answers; on one thread, so that they do not depend on `--processes`."""
    import torch

    recipe, arm, seed, output = job
    message(f"seed {seed}, {arm}")
    file, threads = _file(output, arm, seed), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        answers = arm_of_seed(recipe, arm, seed, file.parent)
    finally:
        torch.set_num_threads(threads)
    lines = ",\n".join(json.dumps(answer.record(), ensure_ascii=False) for answer in answers)
    replace(file, f"[\n{lines}\n]\n")


def _figures(file: Path) -> dict[str, SeedFigures]:
    """The figures of a model from its answers."""
    try:
        return seed_figures(json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise DataError(
            f"{file}: not the answers of a model ({error!r}); remove it, and they are asked again"
        ) from error


def _protocol(recipe: ReversalRecipe) -> dict[str, Any]:
    return {"benchmark": "reversal", "version": _VERSION, **asdict(recipe)}


def _check_folder(output: Path, recipe: ReversalRecipe) -> None:
    """A new folder, an empty one, or one of the same protocol."""
    file = output / PROTOCOL
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: a file; name a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        there = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"--output {output}: not empty, and without the {PROTOCOL} of this benchmark; name another folder"
        ) from None
    mine = _protocol(recipe)
    if there != mine:
        known = there if isinstance(there, dict) else {}
        other = [f"{key} {known.get(key)!r} (here {mine[key]!r})" for key in mine if known.get(key) != mine[key]]
        raise ConfigError(
            f"--output {output}: measured by another protocol ({', '.join(other) or 'of another version'}); "
            "name another folder"
        )


@contextmanager
def _no_space(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{output}: the disk is full; free space and give the same command, which goes on, or name another "
                "--output"
            ) from error
        raise


def _table(found: Found) -> str:
    """Every row and arm with its error over seeds."""
    usable = counting(found)
    seeds = max(len(each) for each in found.values())
    lines = [("right answers in %, mean ± standard error over seeds", *ARMS)]
    for row in ROWS:
        lines.append((row, *(_cell(found, arm, row) for arm in ARMS)))
    for name, figure in (
        ("another fact's answer, drawn at random", "shuffled"),
        ("an answer that no fact has", "unknown"),
        ("the commonest answer's share", "commonest"),
        ("right name less another's, nats", "margin"),
    ):
        for row in ("in place, name asked", "reordered, name asked"):
            lines.append((f"  {row}: {name}", *(_cell(found, arm, row, figure) for arm in ARMS)))
    lines.append(("models that learnt the facts (forward >= 90 %)", *(f"{len(usable[a])} of {seeds}" for a in ARMS)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _cell(found: Found, arm: str, row: str, figure: str = "right") -> str:
    return str(over_seeds(found, arm, row, figure) or "-")


def _claim_table(claims: list[ReversalClaim]) -> str:
    words: Mapping[bool | None, str] = {True: "holds", False: "FAILS", None: ""}
    rows = [("", "measured", "goal", "claim")]
    rows += [(words[c.holds], f"{c.value:.4g} {c.unit}", c.goal, c.claim) for c in claims]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows)
