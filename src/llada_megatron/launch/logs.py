"""`llada logs`: what a job, or one of its ranks, has printed."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import visible
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.registry import SubmittedJob

EXAMPLES = """\
examples:
  llada logs 4711                       the last lines of the job's output: its nodes, rank 0, every fault
  llada logs 4711 --follow              the same, and what is added until the job is over
  llada logs runs/llada-8b --rank 3     everything that rank 3 printed, with stacks of errors and hangs"""
_POLL_S = 0.5
_ASK_SLURM_S = 10.0
_BLOCK = 2**16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada logs`."""
    parser.add_argument("job", metavar="JOB_ID|RUN_DIR", help="which job (of a run: the newest)")
    parser.add_argument("--rank", type=int, metavar="N", help="the log of one rank instead of the job's output")
    parser.add_argument("--lines", type=int, metavar="N", default=50, help="how many lines from the end (default: 50)")
    parser.add_argument("--follow", action="store_true", help="go on showing what is added, until the job is over")


def run(args: argparse.Namespace) -> int:
    """Print the log; returns the exit code."""
    from llada_megatron.launch.cluster import registry

    job = registry.find(args.job)[-1]
    path = job.directory.output
    if args.rank is not None:
        path = _rank_log(job, args.rank)
    if not path.exists() and not args.follow:
        raise ConfigError(
            f"{path}: does not exist yet; `llada jobs {job.record.job_id}` says whether the job has started"
        )
    output = _Output()
    position = _print_tail(path, args.lines, output) if path.exists() else 0
    if args.follow:
        _follow(path, position, job, output)
    output.finish()
    return 0


def _rank_log(job: SubmittedJob, rank: int) -> Path:
    from llada_megatron.launch.ranks.rank import log_path

    if not 0 <= rank < job.record.ranks:
        raise ConfigError(f"--rank {rank}: the job has the ranks 0 to {job.record.ranks - 1}")
    return log_path(Path(job.record.output_dir) / "logs", rank)


def _print_tail(path: Path, lines: int, output: _Output) -> int:
    """Print the last lines; returns the position in the file after them."""
    with path.open("rb") as stream:
        start, text = stream.seek(0, os.SEEK_END), b""
        while start > 0 and text.count(b"\n") <= lines:
            step = min(_BLOCK, start)
            start -= step
            stream.seek(start)
            text = stream.read(step) + text
        wanted = b"".join(io.BytesIO(text).readlines()[-lines:] if lines > 0 else [])
        output.write(wanted)
        return stream.seek(0, os.SEEK_END) if not text else start + len(text)


def _follow(path: Path, position: int, job: SubmittedJob, output: _Output) -> None:
    """Print what is added, until SLURM says that the job is over (or Ctrl-C)."""
    ask_at = time.monotonic()
    over = False
    while not over:
        if time.monotonic() >= ask_at:
            over = _is_over(job)
            ask_at = time.monotonic() + _ASK_SLURM_S
        # After asking SLURM, so that nothing that was printed before the end is missed.
        position = _print_new(path, position, output)
        if not over:
            time.sleep(_POLL_S)


def _print_new(path: Path, position: int, output: _Output) -> int:
    if not path.exists():
        return position
    with path.open("rb") as stream:
        stream.seek(position)
        while text := stream.read(_BLOCK):
            output.write(text)
        return stream.tell()


def _is_over(job: SubmittedJob) -> bool:
    from llada_megatron.launch.cluster import slurm
    from llada_megatron.launch.cluster.status import FINAL

    try:
        found = slurm.queue([job.record.job_id]).get(job.record.job_id)
    except ResourceError:  # the controller is away for a while, or this machine has no SLURM
        verdict = job.directory.read_verdict(job.directory.newest_attempt())
        return verdict is not None and verdict.status in FINAL
    return found is None or not found.is_live


class _Output:
    """Standard output for bytes of a log: control characters and bytes that are no UTF-8 are shown, not sent."""

    def __init__(self) -> None:
        # A block may end inside a character: the rest of it comes with the next one.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")

    def write(self, text: bytes, final: bool = False) -> None:
        """Print a block."""
        sys.stdout.buffer.write(visible(self._decoder.decode(text, final)).encode())
        sys.stdout.flush()

    def finish(self) -> None:
        """Print what is left of a character that was never finished."""
        self.write(b"", final=True)
