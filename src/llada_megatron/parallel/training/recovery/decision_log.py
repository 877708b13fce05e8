"""The policy's decisions: on disk at once, so that a kill before the next checkpoint forgets none, and in words."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import from_dict
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.parallel.checkpoint.manifest import sync_directory
from llada_megatron.parallel.training.recovery.policy import Decision, History, StepFault

FILE_NAME = "recovery.jsonl"


class DecisionLog:
    """OUTPUT_DIR/recovery.jsonl: one JSON object a decision, oldest first. One process reads and writes it."""

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / FILE_NAME

    def append(self, decision: Decision) -> None:
        """Write a decision down; it is on the disk when this returns.

        Raises:
            ResourceError: it cannot be written.
        """
        line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **dataclasses.asdict(decision)}) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            raise ResourceError(
                f"{self.path}: a decision could not be written down ({error.strerror}), and without that nothing is "
                "done about the bad step; make room, and run the same command again"
            ) from None

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # by a kill; the next line stands alone
        with self.path.open("ab") as file:
            file.write(b"\n" * cut + line)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.path.parent)

    def read(self) -> list[Decision]:
        """All decisions; a line cut short by a kill is left out.

        Raises:
            CheckpointError: a line is whole and no decision.
        """
        if not self.path.exists():
            return []
        lines = [_parse(line) for line in self.path.read_text("utf-8", errors="replace").splitlines()]
        try:
            return [from_dict(Decision, line) for line in lines if line is not None]
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}; put the line right, or remove it") from None

    def set_aside(self) -> None:
        """A run that begins anew does not take over the decisions of one that was here before."""
        if self.path.exists():
            self.path.replace(self.path.with_suffix(".jsonl.old"))


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return {key: value for key, value in line.items() if key != "time"} if isinstance(line, dict) else None


def outcome(run: RunConfig, decision: Decision) -> str:
    """What was done, as the second half of a sentence."""
    if decision.kind == "retry":
        return "it was run again from the same state and was fine, so a passing fault of the machine did it"
    dropped = f"left out {samples(run, decision.left_out)}" if decision.left_out else "left no batch out"
    if decision.kind == "skip":
        return dropped
    factor = decision.learning_rate_factor
    rates = "" if factor == 1 else f"; learning rates from step {(decision.back_to or 0) + 1} on are x {factor:g}"
    return f"went back to the checkpoint of step {decision.back_to} and {dropped}{rates}"


def announcement(run: RunConfig, fault: StepFault, decision: Decision, history: History) -> str:
    """The whole line of a decision that has just been taken (and is in `history`)."""
    most = run.recovery.max_decisions
    count = "" if decision.kind == "retry" else f" (decision {history.counted} of at most {most})"
    return f"recovery: {fault}: {outcome(run, decision)}{count}"


def still_in_force(run: RunConfig, decision: Decision) -> str:
    """The line of a decision that a resumed run goes on with."""
    return f"recovery: still in force since step {decision.step} was bad: {outcome(run, decision)}"


def end_of_run(run: RunConfig, fault: StepFault, history: History) -> str:
    """Why the run ends, what was tried, and what to do."""
    batch = samples(run, [fault.step])
    policy = run.recovery
    again = "; a second run from the same state gave the same" if policy.retry else ""
    tried = f". Decisions so far: {'; '.join(_in_short(d) for d in history.decisions)}" if history.decisions else ""
    key = "recovery.not_finite" if fault.reason == "not_finite" else "recovery.spike"
    if history.counted >= policy.max_decisions:
        advice = f"All {policy.max_decisions} decisions of recovery.max_decisions are used up: raise it"
    else:
        advice = f"Set {key}=skip or {key}=rollback (recovery=llada: back to a checkpoint, a quarter of the rate)"
    return (
        f"{fault}{again}; the update was not made, and checkpoints are untouched. It was {batch}{tried}. {advice}, "
        "lower optimizer.learning_rate.peak, or look at this data; then run the same command again"
    )


def end_by_machine(fault: StepFault, history: History) -> str:
    """Why the run ends although a second run was fine."""
    steps = ", ".join(str(d.step) for d in history.decisions[-5:])
    return (
        f"{fault}, and fine when run again; this is passing fault number {history.retries + 1} of this run (the last "
        f"ones in steps {steps}): a machine computes wrongly. Find it with `llada env` and a GPU memory test on each "
        "node, exclude it, and run the same command again"
    )


def samples(run: RunConfig, steps: list[int]) -> str:
    """Steps and the numbers of their samples."""
    size = run.training.global_batch_size
    name = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"{name} (samples {(steps[0] - 1) * size} to {steps[-1] * size - 1})"


def _in_short(decision: Decision) -> str:
    back = "" if decision.back_to is None else f" to {decision.back_to}"
    return f"{decision.kind}{back} at step {decision.step}"
