"""Where each rank of a layout stands, by arithmetic alone: no process group is needed to name a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's place along each axis of the layout."""

    rank: int
    data: int
    pipeline: int
    tensor: int
    context: int
    expert: int

    def __str__(self) -> str:
        axes = f"dp {self.data}, pp {self.pipeline}, tp {self.tensor}, cp {self.context}, ep {self.expert}"
        return f"rank {self.rank} ({axes})"


def locate(rank: int, layout: LayoutConfig) -> RankCoordinates:
    """The place of `rank` in `layout`, in Megatron-Core's order: tensor changes fastest, then context, data, pipeline.

    Within a pipeline stage the experts have an order of their own: expert-tensor fastest, then expert.

    Raises:
        ValueError: `rank` is not in 0 .. world_size - 1.
    """
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank {rank} is not one of the layout's {layout.world_size} ranks")
    stage = layout.world_size // layout.pipeline_parallel
    return RankCoordinates(
        rank=rank,
        data=rank // (layout.tensor_parallel * layout.context_parallel) % layout.data_parallel,
        pipeline=rank // stage,
        tensor=rank % layout.tensor_parallel,
        context=rank // layout.tensor_parallel % layout.context_parallel,
        expert=rank % stage // layout.expert_tensor_parallel % layout.expert_parallel,
    )
