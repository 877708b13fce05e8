"""The directory of one submitted job, `OUTPUT_DIR/jobs/NAME`: what its submitter, nodes and readers share.

    run.yaml cluster.yaml      the resolved configurations, as they were when the job was submitted
    job.sbatch job.json        the script, and what `llada submit` knows of the job (its SLURM id)
    job.out                    output of the script and the nodes, over all attempts
    events/NODE.jsonl          what happened, one line each; a file per node, since appending over NFS is not atomic
    preflight-ATTEMPT/NODE.json   what each node reported of itself
    agents/NODE.log            what torch elastic says on each node
    verdict-ATTEMPT            how an attempt ended; its first word is the status that the script acts on
    stop                       exists when the job is to save and end, and not to be queued again
    attempt                    number of the newest attempt
    newest                     the newest checkpoint at each time that the job went back into the queue, one line each

An attempt is one allocation: 0, then one more for each requeue (SLURM_RESTART_COUNT).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llada_megatron.launch.files import make_once

ATTEMPT_VARIABLE = "LLADA_ATTEMPT"
RENDEZVOUS_VARIABLE = "LLADA_RENDEZVOUS"
"""HOST:PORT of the store on the first node, where the nodes find each other."""

VerdictStatus = Literal["done", "stopped", "failed", "requeue", "exclude"]
"""done: trained to the last step. stopped: saved and ended because a person asked. failed: only a person can help.
requeue: the job goes on in a new allocation. exclude: the same, without the nodes that are named."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended."""

    status: VerdictStatus
    reason: str
    nodes: tuple[str, ...] = ()
    """The nodes to be excluded, where the status is `exclude`."""


@dataclass(frozen=True)
class JobDirectory:
    """Paths and small records of one job."""

    path: Path

    @property
    def run(self) -> Path:
        """The resolved run."""
        return self.path / "run.yaml"

    @property
    def cluster(self) -> Path:
        """The resolved cluster."""
        return self.path / "cluster.yaml"

    @property
    def script(self) -> Path:
        """The script that sbatch was given."""
        return self.path / "job.sbatch"

    @property
    def output(self) -> Path:
        """The output of the script and of all nodes."""
        return self.path / "job.out"

    @property
    def stop(self) -> Path:
        """Exists when the job is to save, end and not come back."""
        return self.path / "stop"

    def newest_attempt(self) -> int:
        """Number of the attempt that began last; 0 before the first."""
        try:
            return int((self.path / "attempt").read_text("ascii"))
        except (FileNotFoundError, ValueError):  # being written
            return 0

    def preflight(self, attempt: int) -> Path:
        """The folder with the nodes' preflight reports."""
        return self.path / f"preflight-{attempt}"

    def verdict(self, attempt: int) -> Path:
        """The file that says how an attempt ended."""
        return self.path / f"verdict-{attempt}"

    def write_verdict(self, attempt: int, verdict: Verdict) -> None:
        """Write how an attempt ended, in two lines: `STATUS [NODE,NODE]`, and the reason. The first verdict is kept."""
        reason = " ".join(verdict.reason.split())
        text = f"{verdict.status} {','.join(verdict.nodes)}".rstrip() + f"\n{reason}\n"
        make_once(self.verdict(attempt), text)

    def read_verdict(self, attempt: int) -> Verdict | None:
        """How an attempt ended; None while it goes on, or when it was killed before it could say."""
        try:
            first, _, reason = self.verdict(attempt).read_text("utf-8").partition("\n")
        except FileNotFoundError:
            return None
        status, _, nodes = first.partition(" ")
        return Verdict(status, reason.strip(), tuple(filter(None, nodes.split(","))))  # type: ignore[arg-type]

    def add_event(self, attempt: int, node: str, event: str, **values: Any) -> None:
        """Note that something happened on `node` (JSON values)."""
        folder = self.path / "events"
        folder.mkdir(exist_ok=True)
        line = {"time": round(time.time(), 3), "attempt": attempt, "node": node, "event": event, **values}
        with (folder / f"{node}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events of all nodes in order of time; lines cut short by a kill or a full disk are skipped."""
        paths = (self.path / "events").glob("*.jsonl")
        found = [_event(text) for path in paths for text in path.read_text("utf-8", errors="replace").splitlines()]
        return sorted(filter(None, found), key=lambda line: line["time"])


def _event(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"time", "attempt", "event"} <= line.keys() else None
