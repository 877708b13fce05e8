"""Starting the ranks of a layout on this machine with torch elastic, and ending them: at Ctrl-C, or after a failure."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from llada_megatron.launch.ranks.hang import LocalHangWatch
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE, available_cores, describe, log_path
from llada_megatron.launch.ranks.rank_reports import REPORTS_VARIABLE, read_failures, read_result
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel.coordinates import locate
from llada_megatron.parallel.training.heartbeat import FOLDER_VARIABLE

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.llada_moe.config.recovery import RecoveryConfig

_POLL_SECONDS = 0.1


class RankError(LladaError):
    """A rank failed, not by a user's error; the message names the rank and the file with its stack."""


class Stopped(KeyboardInterrupt):
    """The job was ended by a signal before its ranks could finish a step."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class LocalOutcome:
    """How a job on this machine ended."""

    result: dict[str, Any]
    """The result that rank 0 reported."""
    stopped_by: int | None
    """The signal after which the ranks finished their step and ended early; None where they ran to the end."""


def python_program(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation, whatever lies in the current directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def run_local(
    program: Sequence[str],
    layout: LayoutConfig,
    log_dir: Path,
    stopping: str = "stopping after this step, with a checkpoint; once more stops at once",
    limits: RecoveryConfig | None = None,
) -> LocalOutcome:
    """Run `program` once per rank of `layout` on this machine and wait for all of them to end.

    Each process finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment and ends through
    `rank.run_local_rank`. The first Ctrl-C (or SIGTERM, SIGHUP) prints `stopping` and asks the ranks to finish their
    step; the second ends them. With `limits`, ranks that write no heartbeat for too long are ended.

    Raises:
        LladaError: a rank's own error, or a RankError that names the rank.
        Stopped: ended by a signal before the ranks could finish a step.
    """
    with tempfile.TemporaryDirectory(prefix="llada-") as reports, _Signals(stopping) as signals:
        heartbeats = Path(reports) / "heartbeats"
        variables = {
            REPORTS_VARIABLE: reports,
            FOLDER_VARIABLE: str(heartbeats),
            PARENT_VARIABLE: str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(layout.world_size))),
            # A thread that waits by spinning holds a core which the thread that it waits for may need: beside one busy
            # process a small model ran at 600 to 2,000 tokens/s on two cores, and at 11,000 without spinning. Alone it
            # ran at 14,000, and at 11,000 without. The nodes of a cluster have no such neighbours.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        log_dir.mkdir(parents=True, exist_ok=True)
        with _environment(variables), _elastic_log(log_dir / "launcher.log"):
            hang = LocalHangWatch(heartbeats, limits, layout, log_dir) if limits else None
            failures = _Agent(program, layout.world_size, Path(reports) / "elastic").run(signals, hang)
        if failures is None:
            return LocalOutcome(read_result(Path(reports)), signals.first)
        _restore_cursor()
        if hang is not None and hang.found is not None:
            raise RankError(hang.found)
        if signals.first is not None:
            raise Stopped(signals.first)
        raise _first_failure(Path(reports), failures, layout, log_dir)


def threads_per_rank(ranks: int) -> int:
    """The number of threads for each of `ranks` processes that share the cores of this machine."""
    return max(1, available_cores() // ranks)


class _Signals:
    """Receives the requests to stop while a job runs, and passes each on to the ranks once."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, stopping: str) -> None:
        self.first: int | None = None
        self._stopping = stopping
        self._again = False
        self._asked: set[int] = set()

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = number
            print(f"\n{self._stopping}", file=sys.stderr, flush=True)
        else:
            self._again = True

    def pass_on(self) -> None:
        """Ask the ranks to stop, or end them; a rank that starts later is asked as soon as it is there."""
        if self.first is None:
            return
        for rank in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                if self._again:
                    os.killpg(rank.pid, signal.SIGKILL)  # every rank leads a process group of its own
                elif rank.pid not in self._asked:
                    self._asked.add(rank.pid)
                    os.kill(rank.pid, signal.SIGINT)


class _Agent:
    """Torch elastic's agent in its own thread, so that signals reach this program and not the agent."""

    def __init__(self, program: Sequence[str], ranks: int, log_dir: Path) -> None:
        self._program, self._ranks, self._log_dir = program, ranks, log_dir
        self._failures: Mapping[int, Any] | None = None
        self._error: BaseException | None = None

    def run(self, signals: _Signals, hang: LocalHangWatch | None) -> Mapping[int, Any] | None:
        """Wait for all ranks; None when all have ended without a failure, else the exit of each failed rank."""
        thread = threading.Thread(target=self._launch, name="elastic", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            signals.pass_on()
            if hang is not None:
                hang.look()
        if self._error is not None:
            raise RankError(f"the ranks could not be started: {self._error}") from self._error
        return self._failures

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # Ranks inherit this: a request to stop is held until the rank handles it (StopRequest.listen).
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            # A file and not a port: torch's store listens on all interfaces, and what lies in it is unpickled.
            rdzv_endpoint=str(self._log_dir.with_name("rendezvous")),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=_POLL_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=str(self._log_dir)),
        )
        try:
            elastic_launch(config, self._program[0])(*self._program[1:])
        except ChildFailedError as error:
            self._failures = error.failures
        except BaseException as error:
            self._error = error


def _first_failure(reports: Path, failures: Mapping[int, Any], layout: LayoutConfig, log_dir: Path) -> LladaError:
    """The failure that most likely caused the others: a killed rank, else the earliest report, else an exit code."""
    reported = read_failures(reports)
    silent = {rank: exit.exitcode for rank, exit in failures.items() if rank not in {each.rank for each in reported}}
    # SIGTERM is how torch elastic ends the ranks that are left after a failure.
    killed = [rank for rank, code in silent.items() if code < 0 and code != -signal.SIGTERM]
    if reported and not killed:
        error = (reported[0].user_error or RankError)(describe(reported[0], layout, log_dir))
        error.__cause__ = RuntimeError("on the rank:\n" + reported[0].stack)
        return error
    rank = min(killed or silent)
    code = silent[rank]
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code} and reported no error"
    cause = " (out of memory?)" if code == -signal.SIGKILL else ""
    return RankError(f"{locate(rank, layout)} {how}{cause}; its output: {log_path(log_dir, rank)}")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _elastic_log(path: Path) -> Iterator[None]:
    """Send the agent's own lines and failure tables to a file: the ranks' reports are clearer."""
    import torch.distributed.launcher.api  # noqa: F401  (torch sets its own handlers when it is imported)

    logger, handler = logging.getLogger("torch.distributed"), logging.FileHandler(path)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _restore_cursor() -> None:
    """Show the cursor again: a rank that was killed while it drew a progress bar has left it hidden."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)
