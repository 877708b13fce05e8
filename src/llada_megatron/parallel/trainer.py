"""The training loop, the same for every layout: resume, step, report, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.config.schema import RunConfig
from llada_megatron.llada_moe.data.loader import TrainingData
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel import assembly
from llada_megatron.parallel.agreement import on_rank_0
from llada_megatron.parallel.checkpoint.search import weights_to_start_from
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.optimizer import build_optimizer, set_learning_rate
from llada_megatron.parallel.reporting import Reporter
from llada_megatron.parallel.state import RunState
from llada_megatron.parallel.step import TrainingStep
from llada_megatron.parallel.validation import validate


class Trainer:
    """One rank of a run. The process groups of the layout exist."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.data = TrainingData(run)
        self.held_out = TrainingData(run, "validation") if run.validation.interval else None
        chunks = assembly.build_run_chunks(run)
        self.models = assembly.wrap(run, chunks)
        self.state = RunState(run, chunks, build_optimizer(run, self.models), self.data.manifests)
        self.step = TrainingStep(run, self.models, self.state.optimizer, self.data)
        self.store = CheckpointStore(
            Path(run.output_dir) / "checkpoints", run.checkpoint.keep_last, run.checkpoint.asynchronous
        )
        resumed = self.state.resume(self.store)
        given = on_rank_0(lambda: weights_to_start_from(run)) if resumed is None else None
        if given is not None:
            self.state.load_weights(self.store, given)
        self.reporter = Reporter(run, self.models, self.data, self.state.step)
        if resumed is not None:
            self.reporter.message(f"continuing from {resumed} at step {self.state.step}")
        self.bits_per_byte: float | None = None

    def train(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Run to the last step, or until a rank's `stop` says so; then save. Returns what the command reports."""
        began, first = time.perf_counter(), self.state.step
        with self.reporter.progress:
            if first < self.run.training.steps:
                self.reporter.start(self.step.batches(first))
            while self.state.step < self.run.training.steps and not _any_rank(stop()):
                self._one_step()
            self.reporter.interval()
            self._save_if_new(first)
        self.reporter.close()
        newest = self.store.latest(thorough=False)
        return {
            "steps": self.state.step,
            "loss": _finite(self.reporter.last_loss),
            "bits_per_byte": self.bits_per_byte,
            "seconds": round(time.perf_counter() - began, 1),
            "checkpoint": str(newest) if newest else None,
            "metrics": str(Path(self.run.output_dir) / "metrics.jsonl"),
            "tensorboard": str(Path(self.run.output_dir) / "tensorboard") if self.run.logging.tensorboard else None,
        }

    def _one_step(self) -> None:
        rate = set_learning_rate(self.run, self.state.optimizer, self.state.step)
        result = self.step(self.state.step)
        if not math.isfinite(result.grad_norm):
            raise LladaError(
                f"the gradient of step {self.state.step + 1} is not finite; nothing was saved after the checkpoint "
                "before it. Lower optimizer.learning_rate.peak, or look at the data of this step, and run the same "
                "command again"
            )
        self.state.step += 1
        number = self.state.step
        self.store.poll()
        if self._due(self.run.validation.interval) and self.held_out is not None:
            with self.reporter.untimed():
                likelihood = validate(self.run, self.models, self.held_out)
            self.bits_per_byte = self.reporter.validation(number, likelihood, self.held_out.bytes_per_token)
        self.reporter.step(number, result, rate)
        if self._due(self.run.checkpoint.interval):
            self._save()

    def _due(self, interval: int) -> bool:
        return interval > 0 and (self.state.step % interval == 0 or self.state.step == self.run.training.steps)

    def _save(self) -> None:
        self.reporter.interval()  # a line of metrics must not be missing after a resume
        with self.reporter.untimed():
            self.state.save(self.store)

    def _save_if_new(self, first: int) -> None:
        self.store.finish()
        saved = self.state.step % self.run.checkpoint.interval == 0 or self.state.step == self.run.training.steps
        if self.state.step > first and not saved:
            self._save()
            self.store.finish()


def _any_rank(stop: bool) -> bool:
    """Whether any rank wants to stop, so that all of them stop after the same step."""
    flag = torch.tensor(int(stop))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
