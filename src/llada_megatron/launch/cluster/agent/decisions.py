"""What follows from how the ranks ended: go on, or end the attempt with a verdict. Pure functions."""

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

Kind = Literal["killed", "lost", "stopped", "user", "error", "hang"]
"""killed: a signal nobody but the machine or a person sends. lost: a node that no longer answers. stopped: a process
that was suspended while all others waited for it. user: an error that only a person can mend. error: any other, often
because of another rank. hang: a rank that got nowhere, most often because it waits for another."""

_CAUSES: tuple[Kind, ...] = ("killed", "lost", "stopped", "user", "error", "hang")
"""The more a fault explains the others, the earlier."""

_LONGEST = 160
"""Characters of an error that is not the user's, in the job's output."""

_OWN_FAULT = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class RankFault:
    """One thing that went wrong on one node."""

    kind: Kind
    node: str
    rank: int | None
    what: str
    """For a person, without the node and the rank."""
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
    """All of them with exit code 0."""
    stop_requested: bool
    """Whether somebody had asked for the job to save and end."""
    faults: tuple[RankFault, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankReport:
        """What `to_dict` wrote."""
        return replace(cls(**values), faults=tuple(RankFault(**fault) for fault in values["faults"]))


def faults_of_exits(
    node: str, exits: Mapping[int, int], reported: Sequence[Failure], logs: Path, now: float
) -> list[RankFault]:
    """Faults of ranks that ended by themselves.

    Args:
        exits: exit codes by rank (negative: a signal).
        reported: what the ranks said of themselves.
        logs: folder of the ranks' output.
    """
    faults, failures = [], {failure.rank: failure for failure in reported}
    for rank, code in sorted(exits.items()):
        failure, log = failures.get(rank), log_path(logs, rank)
        if code == 0:
            continue
        if failure is not None and failure.user_error:
            faults.append(RankFault("user", node, rank, f"failed: {failure.message}", failure.time))
        elif failure is not None:
            what = f"failed: {textwrap.shorten(failure.headline, _LONGEST, placeholder=' …')}; full stack: {log}"
            faults.append(RankFault("error", node, rank, what, failure.time))
        elif code < 0:
            name = signal.Signals(-code).name
            kind: Kind = "killed" if -code in _OWN_FAULT else "error"
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            faults.append(RankFault(kind, node, rank, f"was killed by {name}{hint}; its output: {log}", now))
        else:
            what = f"ended with exit code {code} and said nothing; its output: {log}"
            faults.append(RankFault("error", node, rank, what, now))
    return faults


def cause(faults: Iterable[RankFault]) -> RankFault:
    """The fault that most likely brought the others about."""
    return min(faults, key=lambda fault: (_CAUSES.index(fault.kind), fault.time))


def after_end(steps: int, total: int, stop_file: bool) -> Verdict:
    """All ranks have ended well after `steps` of `total` steps."""
    if steps >= total:
        return Verdict("done", f"trained to step {total}")
    if stop_file:
        return Verdict("stopped", f"stopped as asked, after step {steps} of {total}")
    return Verdict("requeue", f"saved after step {steps} of {total}, before the allocation ends")


@dataclass(frozen=True)
class RestartContext:
    """What else counts when a start has ended in a fault."""

    max_restarts: int
    """Starts that may follow a fault without a newer checkpoint in between."""
    nodes: int
    """Of the job."""
    fits: bool
    """Whether the run can go on with the nodes that are left, and may."""
    attempts_without_progress: int
    """Attempts in a row, with this one, that ended in faults without a newer checkpoint."""
    stop_requested: bool
    """The job was asked to save and end ..."""
    stop_file: bool
    """... by a person, who does not want it to come back."""


def after_faults(faults: Sequence[RankFault], context: RestartContext) -> Verdict | None:
    """What to do when the newest of `faults` has ended a start; None = start the ranks once more.

    Args:
        faults: the causes of this attempt's ends since the newest checkpoint appeared, the last one newest.
    """
    newest = faults[-1]
    if newest.kind == "user":
        return Verdict("failed", str(newest))
    if context.stop_requested:
        status: Literal["stopped", "requeue"] = "stopped" if context.stop_file else "requeue"
        return Verdict(status, f"asked to stop; before the ranks had saved, {newest}")
    if len(faults) <= context.max_restarts:
        return (
            None
            if context.fits
            else Verdict("requeue", f"{newest}; the run does not go on with the nodes that are left")
        )
    tried = f"{len(faults)} faults without a newer checkpoint, the last: {newest}"
    if context.attempts_without_progress >= max(1, context.max_restarts):
        return Verdict("failed", f"{context.attempts_without_progress} attempts without progress; {tried}")
    if context.nodes > 1 and len({fault.node for fault in faults}) == 1:
        return Verdict("exclude", f"all on {newest.node}: {tried}", (newest.node,))
    return Verdict("requeue", tried)


def attempts_without_progress(events: Sequence[Mapping[str, Any]], attempt: int, newest: int | None) -> int:
    """Attempts in a row up to `attempt`, that began at the checkpoint that is still the newest.

    Those that were asked to end (time limit, preemption, a person) do not count, and do not break the row.
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
