"""Rows that each expert-parallel rank computes in each pass of each MoE layer, and the time that the others wait."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from llada_megatron.parallel import device
from llada_megatron.parallel.expert_load import TrainingPasses

BACKWARD = 2.0
"""Time of a backward pass of an expert over that of its forward pass: two products for one."""


@dataclass(frozen=True)
class RankWaiting:
    """What uneven ranks cost, over all passes since the last reading. Seconds are an estimate (see `RankRows.read`)."""

    max_over_mean: float
    """Rows of the busiest rank of a pass over the mean of its group: the sums over passes and layers compared."""
    waiting_share: float
    """Share of the experts' time in which the mean rank waits for the busiest: 1 - mean / max."""
    seconds_lost_per_step: float


class RankRows:
    """Watches the inputs of the experts; nothing where one rank holds all of them."""

    def __init__(self, models: Iterable[torch.nn.Module], passes: TrainingPasses, recomputed: bool) -> None:
        """`recomputed`: the forward pass of a layer runs a second time in the backward pass."""
        self._passes = passes
        self._runs = 1.0 + BACKWARD + recomputed
        self._ranks = parallel_state.get_expert_model_parallel_world_size()
        self._rows: dict[int, list[int]] = {}
        self._clocks: dict[int, Clock] = {}
        if self._ranks > 1:
            for model in models:
                for module in model.modules():
                    if isinstance(module, MoELayer):
                        self._watch(module)

    def _watch(self, layer: MoELayer) -> None:
        rows, clock = self._rows.setdefault(layer.layer_number, []), Clock()
        self._clocks[layer.layer_number] = clock

        def begin(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._passes.under_way:
                return
            rows.append(inputs[0].size(0))  # known on the host: what the dispatcher received
            if len(rows) == 1:
                clock.start()

        def end(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
            if self._passes.under_way and len(rows) == 1:
                clock.stop()

        layer.experts.register_forward_pre_hook(begin)
        layer.experts.register_forward_hook(end)

    def reset(self) -> None:
        """Forget what was seen since the last reading."""
        for rows in self._rows.values():
            rows.clear()

    def read(self, steps: int) -> RankWaiting | None:
        """What was lost in the `steps` since the last reading (collective); None where one rank holds all experts.

        A group waits in each pass of a layer for its busiest rank. Rows beyond the mean, times the seconds per row of
        the passes that were timed (one forward pass of each layer), times the runs of a layer (forward, backward as
        two, and once more where it is recomputed), are the seconds lost; of the stages and groups the slowest counts.
        """
        if self._ranks <= 1:
            return None
        where = device.current()
        mine = torch.tensor([row for rows in self._rows.values() for row in rows], dtype=torch.float64, device=where)
        busiest, total = mine.clone(), mine.clone()
        group = parallel_state.get_expert_model_parallel_group()
        torch.distributed.all_reduce(busiest, torch.distributed.ReduceOp.MAX, group=group)
        torch.distributed.all_reduce(total, group=group)
        mean = total / self._ranks
        timed = sum(rows[0] for rows in self._rows.values() if rows)
        seconds = sum(clock.seconds() for layer, clock in self._clocks.items() if self._rows[layer])
        clocked = torch.tensor([timed, seconds], dtype=torch.float64, device=where)
        sums = torch.cat([busiest.sum()[None], mean.sum()[None], clocked])
        torch.distributed.all_reduce(sums)
        lost = (busiest - mean).sum()
        torch.distributed.all_reduce(lost, torch.distributed.ReduceOp.MAX)
        self.reset()
        of_busiest, of_mean, rows, spent = sums.tolist()
        per_row = spent / rows if rows else 0.0
        return RankWaiting(
            max_over_mean=of_busiest / of_mean if of_mean else 1.0,
            waiting_share=1.0 - of_mean / of_busiest if of_busiest else 0.0,
            seconds_lost_per_step=float(lost) * per_row * self._runs / max(steps, 1),
        )


class Clock:
    """Time of one piece of work; on a GPU by events, which are read when they have long passed."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0
        on_gpu = device.cuda_available()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else None

    def start(self) -> None:
        """The work begins."""
        if self._events is None:
            self._began = time.perf_counter()
        else:
            self._events[0].record()

    def stop(self) -> None:
        """The work, or the giving of it to the device, has ended."""
        if self._events is None:
            self._seconds = time.perf_counter() - self._began
        else:
            self._events[1].record()

    def seconds(self) -> float:
        """How long it took; waits for it."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000.0
