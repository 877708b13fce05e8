"""The policy at work in a run: attempts at steps, and what is done, written down and said about bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.collectives import on_rank_0
from llada_megatron.parallel.fp8 import fp8_state
from llada_megatron.parallel.training.recovery import decision_log, policy
from llada_megatron.parallel.training.recovery.attempt import RouterStateSnapshot, StepAttempt, StepRunner
from llada_megatron.parallel.training.recovery.decision_log import DecisionLog
from llada_megatron.parallel.training.recovery.policy import Decision, StepFault
from llada_megatron.parallel.training.reporter import Reporter
from llada_megatron.parallel.training.state import RunState, check_facts
from llada_megatron.parallel.training.step import TrainingStep


class Recovery:
    """Bad steps of one run. Every method is collective, and all ranks decide alike."""

    def __init__(
        self, run: RunConfig, models: list[torch.nn.Module], step: TrainingStep, state: RunState, reporter: Reporter
    ) -> None:
        self._run, self._state, self._reporter = run, state, reporter
        self._decision_log = DecisionLog(run.output_dir)
        snapshot = RouterStateSnapshot(
            models, lambda: [*reporter.expert_load.counters(), *fp8_state.scaling_tensors(models)]
        )
        self._runner = StepRunner(run, step, state, snapshot)

    def resume(self, resumed: Path | None) -> None:
        """Learn what was decided after the checkpoint that the run resumed from; a new run begins a new log."""
        if resumed is None:
            on_rank_0(self._decision_log.set_aside)
            return
        self._state.history.learn(on_rank_0(self._decision_log.read))
        for decision in self._state.history.decisions:
            if decision.kind != "retry":
                self._reporter.warning(decision_log.still_in_force(self._run, decision))
            if decision.first_step > self._state.step:  # TensorBoard drops what is later than the checkpoint
                self._reporter.decision(decision.first_step, decision_log.outcome(self._run, decision))

    def skips_next_step(self) -> bool:
        """Whether the next step runs no update."""
        return self._state.history.skips(self._state.step + 1)

    def run_step(self, stop: Callable[[], bool]) -> StepAttempt:
        """The next step up to its update.

        Raises:
            LladaError: a second run was fine, as it was so often that the machine must be broken.
        """
        attempt = self._runner(self._state.step, stop)
        if attempt.passed is not None:
            if policy.broken_machine(self._run.recovery, self._state.history):
                self._end(decision_log.end_by_machine(attempt.passed, self._state.history))
            text = self._note(attempt.passed, policy.retried(attempt.passed))
            self._reporter.decision(attempt.passed.step, text)
        return attempt

    def accept(self, attempt: StepAttempt) -> None:
        """The attempt's update was made."""
        self._state.history.accept(attempt.loss, self._run.recovery.spike_window)

    def repair(self, fault: StepFault, store: CheckpointStore) -> None:
        """Skip the bad step, where it stands or after going back to the newest checkpoint.

        No save may be pending.

        Raises:
            LladaError: the policy ends the run, or there is no checkpoint.
        """
        remedy = policy.remedy(self._run.recovery, self._state.history, fault)
        if remedy == "stop":
            self._end(decision_log.end_of_run(self._run, fault, self._state.history))
        if remedy == "skip":
            self._reporter.decision(fault.step, self._note(fault, policy.skipped(fault)))
            return
        path = store.latest(check=check_facts)
        if path is None:
            self._end(f"{fault}, and there is no checkpoint to go back to in {store.directory}")
        back_to = int(store.metadata(path)["step"])
        # written down before it is done, so that a kill from here on ends in the same
        text = self._note(fault, policy.rolled_back(self._run.recovery, fault, back_to))
        self._state.continue_from(store, path)
        self._reporter.go_back(self._state.step)
        self._reporter.decision(self._state.step + 1, text)

    def _note(self, fault: StepFault, decision: Decision) -> str:
        """Put a decision into the history and on disk, and say it; returns what was said."""
        decision = self._state.history.add(decision)
        on_rank_0(lambda: self._decision_log.append(decision))
        text = decision_log.announcement(self._run, fault, decision, self._state.history)
        self._reporter.warning(text)
        return text

    def _end(self, reason: str) -> NoReturn:
        self._reporter.interval()  # the lines up to here help to find out why
        raise LladaError(reason)
