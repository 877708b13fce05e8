"""`make demo`: prepare a corpus, train a small LLaDA-MoE on it with two processes, and show what it learnt.

A phase whose result exists is skipped; a training that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from llada_megatron import __version__
from llada_megatron.console import coloured, error, message
from llada_megatron.llada_moe.errors import ConfigError, DataError, LladaError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.parallel.evaluation.assessment import Assessment

CONFIG = "demo"

CORPUS = "python-stdlib"

SEQUENCES = 512
"""Number of held-out windows that the figures are measured on."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values laid over the configuration's")
    parser.add_argument(
        "--config",
        default=CONFIG,
        metavar="RUN",
        help=f"YAML file of the run, or a name in configs/runs (default: {CONFIG})",
    )
    parser.add_argument(
        "--corpus",
        default=CORPUS,
        metavar="INPUT",
        help="text file, folder or JSONL (default: the Python standard library)",
    )
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="held-out windows to measure on")
    parser.add_argument("--require", action="store_true", help="exit with 1 where a required goal is missed")
    parser.add_argument("--version", action="version", version=f"llada {__version__}")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except LladaError as failure:
        error(str(failure))
        return failure.exit_code
    except KeyboardInterrupt as stopped:
        message("interrupted; `make demo` continues from here")
        return getattr(stopped, "exit_code", 130)


def run(args: argparse.Namespace) -> int:
    """Prepare, train, evaluate, report."""
    from llada_megatron.llada_moe.config import load_run

    config = load_run(args.config, args.overrides, message)
    log = PhaseLog(Path(config.output_dir))
    prepare(config, args.corpus, log)
    stopped_by = train(config, log)
    if stopped_by is not None:
        message("stopped; `make demo` continues from the newest checkpoint")
        return 128 + stopped_by
    missed = report(config, args.sequences, log)
    if not args.require:
        return 0
    for goal in missed:
        error(f"goal missed: {goal}")
    return 1 if missed else 0


def prepare(config: RunConfig, corpus: str, log: PhaseLog) -> None:
    """Prepare the run's corpus, unless that has been done.

    Raises:
        DataError: the corpus could not be prepared.
        ConfigError: there is a prepared set of another corpus.
    """
    from llada_megatron.llada_moe.data.set_manifest import read_manifest

    prefix = config.data.sets[0].path
    try:
        found = read_manifest(prefix)
    except DataError:
        found = None
    if found is not None:
        if [source.input for source in found.sources] != [corpus]:
            raise ConfigError(
                f"{prefix} was prepared from {', '.join(s.input for s in found.sources)}, not {corpus}; "
                f"choose another output_dir and data.sets.0.path, or remove {config.output_dir}"
            )
        if found.near_duplicates is None or found.vocabulary_held_out != config.data.validation_fraction:
            raise ConfigError(
                f"{prefix} was prepared with held-out documents that repeat others or that its vocabulary knows; "
                f"choose another output_dir and data.sets.0.path, or remove {config.output_dir}"
            )
        _say(f"1/3 data: {prefix} exists ({found.tokens:,} tokens)")
        return
    _say(f"1/3 data: preparing {corpus}")
    command = [sys.executable, "-P", "-m", "llada_megatron.cli", "prepare", corpus, "--output", prefix, "--overwrite"]
    with log.phase("prepare", afresh=True):
        vocabulary = ["--train-tokenizer", "--vocab-size", str(config.model.vocab_size)]
        vocabulary += ["--validation-fraction", str(config.data.validation_fraction)]
        done = subprocess.run([*command, *vocabulary], check=False, stdout=sys.stderr)
    if done.returncode:
        raise DataError(f"the corpus could not be prepared (exit code {done.returncode}; see above)")


def train(config: RunConfig, log: PhaseLog) -> int | None:
    """Train to the last step, unless that has been done; returns the signal that stopped it early, else None."""
    from llada_megatron.launch.train import start
    from llada_megatron.parallel.checkpoint.manifest import steps

    found = steps(Path(config.output_dir) / "checkpoints")
    newest = found[0][0] if found else 0
    if newest >= config.training.steps:
        _say(f"2/3 training: finished earlier, {newest} steps in {found[0][1]}")
        return None
    processes, axes = config.layout.world_size, f"expert parallel {config.layout.expert_parallel}"
    begin = f"from step {newest} " if newest else ""
    _say(f"2/3 training: {begin}to step {config.training.steps} with {processes} processes ({axes})")
    with log.phase("train", afresh=newest == 0):
        return start(config).stopped_by


def report(config: RunConfig, sequences: int, log: PhaseLog) -> list[str]:
    """Evaluate the checkpoint, write report.json and report.md, print the result; returns the goals it misses."""
    from llada_megatron.launch import demo_report

    _say("3/3 evaluation: held-out documents")
    directory = Path(config.output_dir)
    with log.phase("evaluate", afresh=True):
        result, checkpoint = evaluate(directory, sequences)
    seconds = {name: phase.seconds for name, phase in log.phases.items()}
    memory = max(phase.peak_memory_gb for phase in log.phases.values())
    paths = demo_report.ResultPaths(checkpoint, str(directory / "tensorboard"), str(directory / "report.md"))
    values = demo_report.as_json(result, seconds, memory, paths)
    (directory / "report.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (directory / "report.md").write_text(demo_report.as_markdown(result, seconds, memory, paths), "utf-8")

    def paint(text: str, code: str) -> str:
        return coloured(text, code, sys.stdout)

    print("\n" + demo_report.as_text(result, seconds, memory, paths, paint))
    return demo_report.missed_goals(result)


def evaluate(directory: Path, sequences: int) -> tuple[Assessment, str]:
    """The assessment of the run's newest checkpoint, and the path of the checkpoint."""
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
    from llada_megatron.parallel.evaluation.assessment import assess
    from llada_megatron.parallel.sampling.checkpoint_tokenizer import checkpoint_tokenizer

    with open_checkpoint(directory) as loaded:
        return assess(loaded, checkpoint_tokenizer(loaded), sequences), str(loaded.path)


def _say(text: str) -> None:
    message(coloured(text, "1", sys.stderr))


@dataclass
class Phase:
    """Time and memory of one phase, over all runs of the demo that worked on it."""

    seconds: float = 0.0
    peak_memory_gb: float = 0.0


class PhaseLog:
    """Time and memory of the phases, kept in OUTPUT_DIR/phases.json for later runs that reuse the results."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "phases.json"
        self.phases: dict[str, Phase] = {}
        if self._path.is_file():
            self.phases = {name: Phase(**values) for name, values in json.loads(self._path.read_text("utf-8")).items()}

    @contextlib.contextmanager
    def phase(self, name: str, afresh: bool) -> Iterator[None]:
        """Add the time and memory of a `with` block to a phase; `afresh` replaces what the phase took before."""
        began, before = time.monotonic(), Phase() if afresh else self.phases.get(name, Phase())
        memory = PeakMemory()
        try:
            with memory:
                yield
        finally:
            seconds = before.seconds + time.monotonic() - began
            self.phases[name] = Phase(seconds, max(before.peak_memory_gb, memory.gigabytes))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({name: asdict(phase) for name, phase in self.phases.items()}), "utf-8")


class PeakMemory:
    """The largest resident memory of this process and all its children during a `with` block.

    A thread looks every `seconds_between_looks`. Short peaks in between are missed; memory that processes share is
    counted in each of them.
    """

    def __init__(self, seconds_between_looks: float = 0.5) -> None:
        self._pause = seconds_between_looks
        self._peaks: dict[tuple[int, float], int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    @property
    def gigabytes(self) -> float:
        """The sum of the peaks of all processes that were seen, in GB (10^9 bytes)."""
        return sum(self._peaks.values()) / 1e9

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while True:
            for process in [here, *here.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    name = process.pid, process.create_time()
                    self._peaks[name] = max(self._peaks.get(name, 0), process.memory_info().rss)
            if self._done.wait(self._pause):
                return


if __name__ == "__main__":
    sys.exit(main())
