"""The watchers of a run's experts, which share the training passes, and the reading of all at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.expert_load import ExpertLoad, TrainingPasses
from llada_megatron.parallel.training.experts.expert_reading import ExpertReading
from llada_megatron.parallel.training.experts.rank_rows import RankRows
from llada_megatron.parallel.training.experts.router_watch import RouterWatch


class ExpertMonitor:
    """Watches the experts of a run on this rank's model chunks; a dense model has nothing to watch."""

    def __init__(self, run: RunConfig, models: Iterable[torch.nn.Module]) -> None:
        chunks = list(models)
        self._run = run
        self._watched = run.model.moe is not None
        passes = TrainingPasses(chunks if self._watched else [])
        training = run.training
        recomputed = training.recompute == "full" or "moe" in training.recompute_modules
        self._load = ExpertLoad(chunks, passes=passes)
        self._rows = RankRows(chunks, passes, recomputed)
        self.routers = RouterWatch(chunks, passes)

    def counters(self) -> list[torch.Tensor]:
        """Tensors that the passes change in place."""
        return self._load.counters()

    def reset(self) -> None:
        """Forget what was seen since the last reading."""
        for watcher in (self._load, self._rows, self.routers):
            watcher.reset()

    def read(self, steps: int) -> ExpertReading | None:
        """Everything since the last reading, `steps` ago, over all ranks (collective); None for a dense model."""
        if not self._watched:
            return None
        counts = self._load.reduce_bins()
        routers = self.routers.read(self._run.model.num_layers)
        waiting = self._rows.read(steps)
        return ExpertReading(steps, counts, routers, self._run.layout.expert_parallel, waiting)
