"""The training loop, the same for every layout: resume, step, recover, report, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.training_data import samples_of
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel import build
from llada_megatron.parallel.checkpoint.search import weights_to_start_from
from llada_megatron.parallel.collectives import on_rank_0
from llada_megatron.parallel.training.distributed_optimizer import build_optimizer, set_learning_rate
from llada_megatron.parallel.training.heartbeat import Heartbeat
from llada_megatron.parallel.training.out_of_memory import explained
from llada_megatron.parallel.training.recovery.attempt import StepAttempt
from llada_megatron.parallel.training.recovery.policy import may_go_back
from llada_megatron.parallel.training.recovery.repair import Recovery
from llada_megatron.parallel.training.reporter import Reporter
from llada_megatron.parallel.training.run_folder import RunFolder
from llada_megatron.parallel.training.saving import Saver, open_store
from llada_megatron.parallel.training.state import RunState, load_frozen
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.parallel.training.validation import validate


class Trainer:
    """One rank of a run. The process groups of the layout exist."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.heartbeat = Heartbeat.of_rank(torch.distributed.get_rank())
        self.heartbeat.beat(0, "start")
        self.objective = make_objective(run.objective, run.training)
        self.data = samples_of(self.objective, run, "train")
        self.held_out = samples_of(self.objective, run, "validation") if run.validation.interval else None
        chunks = build.build_run_chunks(run)
        self.models = build.wrap(run, chunks)
        self.state = RunState(run, self.objective, chunks, build_optimizer(run, self.models), self.data.manifests)
        self.store = open_store(run)
        self.heartbeat.beat(0, "load")
        frozen = {name: load_frozen(run, self.store, path) for name, path in self.objective.frozen_models().items()}
        self.step = TrainingStep(run, self.models, self.state.optimizer, self.data, self.objective, frozen, ahead=True)
        resumed = self.state.resume(self.store)
        given = on_rank_0(lambda: weights_to_start_from(run)) if resumed is None else None
        if given is not None:
            self.state.load_weights(self.store, given)
        self.heartbeat.beat(self.state.step, "start")
        self.reporter = Reporter(run, self.objective, self.models, self.data, self.state.step)
        if resumed is not None:
            self.reporter.message(f"continuing from {resumed} at step {self.state.step}")
        for remark in [*self.state.remarks, *self.objective.remarks()]:
            self.reporter.warning(remark)
        self.recovery = Recovery(run, self.models, self.step, self.state, self.reporter)
        self.recovery.resume(resumed)
        self.new = resumed is None
        self.saver = Saver(run, self.store, self.reporter, resumed, self.state.step)
        # only now, so that a run that cannot continue what is there leaves the old files
        first = self.data.manifests[0]
        self.folder = RunFolder(run, first.tokenizer, given, first.chat.template if first.chat else None)
        on_rank_0(lambda: self.folder.open(self.reporter.warning))
        self.bits_per_byte: float | None = None
        self.stopping = False

    def train(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Run to the last step, or until a rank's `stop` says so; then save. Returns what the command reports."""
        began, first = time.perf_counter(), self.state.step
        with self.reporter.progress, closing(self.step):
            if first < self.run.training.steps:
                self.reporter.start(self.step.batches(first))
            if self.new and may_go_back(self.run.recovery):
                self._checkpoint()
            while self.state.step < self.run.training.steps and not self.stopping:
                self._one_step(stop)
            self.reporter.interval()
            self.heartbeat.beat(self.state.step, "save")
            self.saver.end(self.state, partial(self._in_a_hurry, stop))
            if self._restores_folder():
                self.saver.end(self.state, partial(self._in_a_hurry, stop))
        self.reporter.close()
        self.heartbeat.beat(self.state.step, "done")
        newest = self.store.latest(thorough=False)
        return {
            "steps": self.state.step,
            "recovery_decisions": self.state.history.counted or None,
            "loss": _finite(self.reporter.last_loss),
            "bits_per_byte": self.bits_per_byte,
            "seconds": round(time.perf_counter() - began, 1),
            "checkpoint": str(newest) if newest else None,
            "metrics": str(Path(self.run.output_dir) / "metrics.jsonl"),
            "tensorboard": str(Path(self.run.output_dir) / "tensorboard") if self.run.logging.tensorboard else None,
        }

    def _in_a_hurry(self, stop: Callable[[], bool]) -> bool:
        """Whether what need not be done now is to be left to the next start."""
        self.heartbeat.beat(self.state.step, "save")
        return stop() or self.stopping

    def _one_step(self, stop: Callable[[], bool]) -> None:
        """Run the next step; leave it out, or go back, where the recovery policy says so."""
        self.heartbeat.beat(self.state.step, "step")
        factor = self.state.history.rate_factor(self.state.step + 1)
        rate = set_learning_rate(self.run, self.state.optimizer, self.state.step, factor)
        if self.recovery.skips_next_step():
            self._finish_step(None, rate)
            return
        with self._explained():
            attempt = self.recovery.run_step(stop)
        self.stopping = attempt.stop
        if attempt.fault is not None:
            self.heartbeat.beat(self.state.step, "load")
            self.saver.finish()
            before = self.state.step
            self.recovery.repair(attempt.fault, self.store)
            if self.state.step < before:
                self.saver.went_back(self.state.step)
            return  # what is left out now is passed over when the loop comes to it
        with self._explained():
            self.step.update(attempt.norm)
        self.recovery.accept(attempt)
        self._finish_step(attempt, rate)

    def _explained(self) -> AbstractContextManager[None]:
        """Memory that runs out inside is told of in one line."""
        return explained(self.run, self.models, self.state.optimizer)

    def _finish_step(self, attempt: StepAttempt | None, rate: float) -> None:
        """Count the step (None: it was left out); validate, report and save where that is due."""
        self.state.step += 1
        number = self.state.step
        self.saver.poll()
        if self._due(self.run.validation.interval) and self.held_out is not None:
            with self.reporter.untimed():
                alive = partial(self.heartbeat.beat, number, "validation")
                likelihood = validate(self.run, self.objective, self.models, self.held_out, number - 1, alive)
            self.state.validated(likelihood)
            self.bits_per_byte = self.reporter.validation(number, likelihood, self.held_out.bytes_per_token)
        self.reporter.step(number, attempt, rate, self.state.history.in_force(number))
        restored = self._due(self.run.logging.interval) and self._restores_folder()
        if restored or self._due(self.run.checkpoint.interval):
            self._checkpoint()

    def _restores_folder(self) -> bool:
        """Notice that the run's folder went away, or a part of it, and make it anew; returns whether that was so.

        What was saved counts as lost then, and is to be saved again (collective).
        """
        gone = on_rank_0(lambda: self.folder.missing(self.saver.saved_path) + self.reporter.missing())
        if gone:
            on_rank_0(self.folder.restore)
            self.reporter.reopen(self.state.step)
            self.saver.forget()
            self.reporter.warning(
                f"step {self.state.step}: {', '.join(gone)} went away from {self.run.output_dir} while the run was "
                "writing there. The folder is made anew and a checkpoint saved; earlier metrics and checkpoints that "
                "went with it are lost"
            )
        return bool(gone)

    def _due(self, interval: int) -> bool:
        return interval > 0 and (self.state.step % interval == 0 or self.state.step == self.run.training.steps)

    def _checkpoint(self) -> None:
        self.heartbeat.beat(self.state.step, "save")
        self.saver.save(self.state)
        self.heartbeat.beat(self.state.step, "step")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
