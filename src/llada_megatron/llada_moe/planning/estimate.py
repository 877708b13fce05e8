"""A run on a kind of GPU: what each pipeline stage's ranks hold, whether it fits, and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.model.flops import flops_per_token
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.planning.expert_loads import ExpertLoads
from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet
from llada_megatron.llada_moe.planning.held_parameters import Held, stage_parameters
from llada_megatron.llada_moe.planning.memory import StageMemory, fullest, memory_by_stage
from llada_megatron.llada_moe.planning.step_time import StepTime, step_time
from llada_megatron.llada_moe.planning.traffic import Traffic, traffic
from llada_megatron.llada_moe.planning.workload import Workload, of_run, steps_looked_at

GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """What a run file does not say."""

    imbalance: float = 1.3
    """Rows of the fullest expert rank over the mean."""
    documents: float = 1.0
    """Documents in a window."""
    loads: ExpertLoads | None = None
    """Measured loads, in the place of `imbalance`."""


@dataclass(frozen=True)
class Estimate:
    """A run, the GPU, and what follows; everything is computed when asked for."""

    run: RunConfig
    gpu: GpuSheet
    assumed: Assumptions
    counted: list[Held] | None = None
    """Parameters of a rank of each stage, counted in the real model; None = from the sizes."""

    @cached_property
    def workload(self) -> Workload:
        """The run as a workload."""
        return of_run(self.run, self.assumed.imbalance, self.assumed.documents, self._layer_imbalance)

    @property
    def _layer_imbalance(self) -> tuple[float, ...]:
        loads = self.assumed.loads
        return loads.imbalances(self.run.layout.expert_parallel) if loads else ()

    @cached_property
    def held(self) -> list[Held]:
        """Parameters of a rank of each stage."""
        stages = range(self.run.layout.pipeline_parallel)
        return self.counted or [stage_parameters(self.workload, stage) for stage in stages]

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Memory of a rank of each stage."""
        return memory_by_stage(self.workload, self.held)

    @property
    def worst(self) -> StageMemory:
        """The stage whose ranks need most."""
        return fullest(self.stages)

    @property
    def card_bytes(self) -> float:
        """Of the fullest rank, with what the allocator keeps, the context and the communicators."""
        gpu = self.gpu
        outside = gpu.context_gib + gpu.communicators_gib * (self.run.layout.world_size > 1)
        return self.worst.allocated * gpu.reserved_over_allocated + outside * GIB

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits on the card."""
        return self.card_bytes <= self.gpu.memory_gib * GIB

    @cached_property
    def time(self) -> StepTime:
        """Seconds of a step."""
        return step_time(self.workload, self.gpu)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step over all ranks."""
        return self.run.training.global_batch_size * self.run.training.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.tokens_per_step / self.time.total / self.run.layout.world_size

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs over all ranks, by the formula of `model.flops`."""
        workload = self.workload
        copies = workload.sequence // self.run.training.sequence_length
        each = flops_per_token(
            self.run.model,
            workload.sequence,
            keys_per_query=workload.keys,
            supervised_share=workload.supervised_mean * copies,
            copies=copies,
            frozen=self.run.training.lora is not None,
        )
        return each.total * self.tokens_per_step

    @property
    def utilisation(self) -> float:
        """Model FLOPs a second over the bf16 peak of all GPUs."""
        return self.flops_per_step / self.time.total / self.run.layout.world_size / (self.gpu.bf16_tflops * 1e12)

    @cached_property
    def largest_share(self) -> float:
        """Share of the run's steps whose sequences hold their text as often as those that are planned."""
        objective, steps = make_objective(self.run.objective, self.run.training), self.run.training.steps
        looked_at = steps_looked_at(steps)
        return sum(objective.pattern(step).copies == objective.copies for step in looked_at) / len(looked_at)

    @cached_property
    def run_seconds(self) -> float:
        """Of all steps of the run; those whose sequences hold their text once are shorter."""
        seconds, share = self.time.total, self.largest_share
        if share < 1:
            shorter = of_run(self.run, self.assumed.imbalance, self.assumed.documents, self._layer_imbalance, copies=1)
            seconds = share * seconds + (1 - share) * step_time(shorter, self.gpu).total
        return seconds * self.run.training.steps

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.run_seconds * self.run.layout.world_size / 3600

    @property
    def cache_bytes(self) -> float:
        """Keys and values that a rank keeps for one sampled sequence of the run's length, in the fullest stage."""
        stack, layout = self.workload.stack, self.run.layout
        layers = max(len(layers) for layers in self.workload.stage_layers)
        heads = max(stack.key_heads / layout.tensor_parallel, 1)  # a key head is never cut
        return 2 * 2 * layers * heads * stack.head_dim * self.run.training.sequence_length

    @property
    def traffic(self) -> list[Traffic]:
        """Bytes that a rank sends in a step, by axis."""
        return traffic(self.workload, self.held, self.gpu.gpus_per_node)
