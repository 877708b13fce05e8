"""A layout for a new run file: the one that cuts the model least and whose training state fits into the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout, divisors
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.parameters import rank_shares

USABLE = 0.6
"""Share of a rank's memory for weights, gradients and optimizer state; activations and buffers need the rest."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run is to be laid out for."""

    ranks: int
    ranks_per_node: int
    rank_bytes: float
    """Memory of a rank."""
    precision: str
    """`bf16` or `fp32`."""


def choose_layout(model: ModelConfig, machine: Machine) -> LayoutConfig:
    """The layout of all ranks with the fewest pipeline stages, then the least tensor parallelism, then the most experts
    spread over ranks. Tensor parallelism and experts stay within a node.

    Raises:
        ResourceError: the training state does not fit in any layout; with the least that a rank would need.
    """
    least = float("inf")
    for layout in _layouts(model, machine):
        needed = state_bytes(model, layout, machine.precision)
        if needed <= USABLE * machine.rank_bytes:
            return layout
        least = min(least, needed)
    raise ResourceError(
        f"weights, gradients and optimizer state need {least / 1e9:.0f} GB or more on each of {machine.ranks} ranks, "
        f"and {USABLE:.0%} of {machine.rank_bytes / 1e9:.0f} GB are for them: take more nodes, or a smaller model"
    )


def state_bytes(model: ModelConfig, layout: LayoutConfig, precision: str) -> int:
    """Weights, gradients and optimizer state of the fullest rank, in bytes, as `resources.needed_bytes` counts them.

    The fp32 main weights (for bf16) and the two moments of Adam are divided among the data-parallel ranks, those of the
    experts among the ranks that hold the same ones.
    """
    weight_and_gradient, optimizer = (2 + 4, 12) if precision == "bf16" else (4 + 4, 8)
    copies = layout.data_parallel * layout.context_parallel
    held = max(share.parameters for share in rank_shares(model, layout))
    return held * weight_and_gradient + held * optimizer // max(1, copies // layout.expert_parallel)


def _layouts(model: ModelConfig, machine: Machine) -> Iterator[LayoutConfig]:
    """Every layout of all ranks that the model can have, the one that cuts it least first."""
    experts = divisors(model.moe.num_experts)[::-1] if model.moe else [1]
    for pipeline in divisors(machine.ranks):
        for tensor in divisors(machine.ranks // pipeline):
            for expert in experts:
                layout = LayoutConfig(
                    tensor_parallel=tensor,
                    sequence_parallel=tensor > 1,
                    pipeline_parallel=pipeline,
                    data_parallel=machine.ranks // pipeline // tensor,
                    expert_parallel=expert,
                )
                problems: list[str] = []
                if max(tensor, expert) <= machine.ranks_per_node:
                    check_layout(model, layout, lambda key, reason, problems=problems: problems.append(key))
                    if not problems:
                        yield layout
