"""What an agent does once its ranks have ended: start them again, or end the attempt with a verdict. Pure functions."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llada_megatron.launch.cluster.job import Verdict
from llada_megatron.launch.ranks.rank import log_path
from llada_megatron.launch.ranks.rank_reports import Failure
from llada_megatron.llada_moe.errors import MemoryRanOutError

Kind = Literal["killed", "lost", "stopped", "user", "error", "hang"]
"""killed: by a signal that only the system or a person sends. lost: a node that no longer answers. stopped: a process
that was suspended while all others waited for it. user: an error that only the user can correct. error: any other one,
often a consequence of another rank's. hang: a rank without progress, most often because it waits for another rank."""

_CAUSES: tuple[Kind, ...] = ("killed", "lost", "stopped", "user", "error", "hang")
"""Kinds in order: a fault of an earlier kind usually explains those of later kinds."""

_LONGEST = 160
"""Longest text, in characters, that the job's output shows of an error that is not the user's."""

_KILLING_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class RankFault:
    """One thing that went wrong on one node."""

    kind: Kind
    node: str
    rank: int | None
    what: str
    """A description for people, which does not repeat the node and the rank."""
    time: float
    """Seconds since 1970, by the clock of that node."""

    def __str__(self) -> str:
        where = self.node if self.rank is None else f"rank {self.rank} on {self.node}"
        return f"{where} {self.what}"


@dataclass(frozen=True)
class RankReport:
    """How the ranks on one node ended."""

    node: str
    finished: bool
    """Whether all of them ended with exit code 0."""
    stop_requested: bool
    """Whether the job had been asked to save and end."""
    faults: tuple[RankFault, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankReport:
        """The report that `to_dict` was called on."""
        return replace(cls(**values), faults=tuple(RankFault(**fault) for fault in values["faults"]))


def faults_of_exits(
    node: str, exits: Mapping[int, int], reported: Sequence[Failure], logs: Path, now: float
) -> list[RankFault]:
    """The faults of the ranks on one node that have ended by themselves.

    Args:
        exits: exit code of each rank that has ended (negative: the signal that killed it).
        reported: the failures that the ranks reported themselves.
        logs: the folder with the logs of the ranks.
        now: the time of a fault that no rank has reported, in seconds since 1970.
    """
    faults, failures = [], {failure.rank: failure for failure in reported}
    for rank, code in sorted(exits.items()):
        failure, log = failures.get(rank), log_path(logs, rank)
        if code == 0:
            continue
        if failure is not None and failure.user_error not in (None, MemoryRanOutError):  # a neighbour may have taken it
            faults.append(RankFault("user", node, rank, f"failed: {failure.message}", failure.time))
        elif failure is not None:
            what = f"failed: {textwrap.shorten(failure.headline, _LONGEST, placeholder=' …')}; full stack: {log}"
            faults.append(RankFault("error", node, rank, what, failure.time))
        elif code < 0:
            name = signal.Signals(-code).name
            kind: Kind = "killed" if -code in _KILLING_SIGNALS else "error"
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            faults.append(RankFault(kind, node, rank, f"was killed by {name}{hint}; its output: {log}", now))
        else:
            what = f"ended with exit code {code} and reported no error; its output: {log}"
            faults.append(RankFault("error", node, rank, what, now))
    return faults


def cause(faults: Iterable[RankFault]) -> RankFault:
    """The fault that most likely brought the others about."""
    return min(faults, key=lambda fault: (_CAUSES.index(fault.kind), fault.time))


def after_end(steps: int, total: int, stop_file: bool) -> Verdict:
    """The verdict when all ranks have ended without a fault after `steps` of `total` steps."""
    if steps >= total:
        return Verdict("done", f"trained to step {total}")
    if stop_file:
        return Verdict("stopped", f"stopped on request after step {steps} of {total}")
    return Verdict("requeue", f"saved after step {steps} of {total}, before the allocation ends")


@dataclass(frozen=True)
class RestartContext:
    """What `after_faults` needs to know besides the faults."""

    max_restarts: int
    """How often the ranks may be started again without a newer checkpoint in between."""
    nodes: int
    """Number of nodes of the job."""
    fits: bool
    """Whether the run can go on with the nodes that are left: its layout fits them, and the cluster file allows it."""
    attempts_without_progress: int
    """How many attempts in a row, including this one, have ended in faults without a newer checkpoint."""
    stop_requested: bool
    """Whether the job was asked to save and end, by SLURM or by a person."""
    stop_file: bool
    """Whether a person asked with `llada stop`: then the job is not queued again."""


def after_faults(faults: Sequence[RankFault], context: RestartContext) -> Verdict | None:
    """What to do when the newest of `faults` has ended the ranks: a verdict, or None to start them once more.

    Args:
        faults: one fault for each time that the ranks of this attempt have ended since the newest checkpoint was
            written; the last one is the newest.
    """
    newest = faults[-1]
    if newest.kind == "user":
        return Verdict("failed", str(newest))
    if context.stop_requested:
        status: Literal["stopped", "requeue"] = "stopped" if context.stop_file else "requeue"
        return Verdict(status, f"asked to stop, but before the ranks had saved: {newest}")
    if len(faults) <= context.max_restarts:
        return (
            None if context.fits else Verdict("requeue", f"{newest}; the run cannot go on with the nodes that are left")
        )
    tried = f"{len(faults)} faults without a newer checkpoint, the last: {newest}"
    if context.attempts_without_progress >= max(1, context.max_restarts):
        return Verdict("failed", f"{context.attempts_without_progress} attempts without progress; {tried}")
    if context.nodes > 1 and len({fault.node for fault in faults}) == 1:
        return Verdict("exclude", f"all on {newest.node}: {tried}", (newest.node,))
    return Verdict("requeue", tried)


def attempts_without_progress(events: Sequence[Mapping[str, Any]], attempt: int, newest: int | None) -> int:
    """How many attempts in a row, the last of them `attempt`, began at the checkpoint that is still the newest.

    Attempts that were asked to end (by a time limit, a preemption or a person) are skipped: they neither count nor end
    the row.
    """
    began: dict[int, int | None] = {}
    asked = {event["attempt"] for event in events if event["event"] == "asked" or event.get("asked")}
    for event in events:
        if event["event"] == "start":
            began.setdefault(event["attempt"], event["checkpoint"])
    count = 0
    for number in sorted((each for each in began if each <= attempt), reverse=True):
        if began[number] != newest:
            break
        count += number not in asked
    return count
