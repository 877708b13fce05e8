"""The weights of this rank's model chunks as `dist_checkpointing` saves and loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

from llada_megatron.llada_moe.config.trained_parts import FACTORS
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.parallel.fp8.fp8_state import without_pickles


def apply_factories_copy(chunk: DiffusionTransformer) -> dict[str, Any]:
    """The chunk's sharded state, in which fused matrices (gate and up) are separate views of the parameter."""
    state = chunk_state(chunk)
    apply_factories(state)
    return state


def state_metadata() -> dict[str, Any]:
    """The metadata for Megatron's `sharded_state_dict` functions, the same for saving and loading."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,  # else dense models stack the layers of a weight under one name
    }


def chunk_state(chunk: DiffusionTransformer) -> dict[str, Any]:
    """Sharded weights and buffers of one chunk, without the pickled extra state of Transformer Engine (what is to be
    kept of that is `fp8_state`)."""
    with without_pickles(chunk):
        state = chunk.sharded_state_dict(metadata=state_metadata())
    return {name: value for name, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def model_state(chunks: list[DiffusionTransformer]) -> dict[str, Any]:
    """Sharded state of this rank's chunks, as `dist_checkpointing` saves and loads it."""
    return {_chunk_key(index, len(chunks)): chunk_state(chunk) for index, chunk in enumerate(chunks)}


def base_state(state: dict[str, Any]) -> dict[str, Any]:
    """What `model_state` gave without the low-rank factors: what a checkpoint of a run without them holds."""
    return {key: {name: value for name, value in of.items() if not name.endswith(FACTORS)} for key, of in state.items()}


def load_model_state(chunks: list[DiffusionTransformer], state: dict[str, Any]) -> None:
    """Put loaded weights into the chunks."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[_chunk_key(index, len(chunks))], strict=False)


def fill_weights(chunks: list[DiffusionTransformer], read: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Copy weights into the chunks of a world of one process.

    Args:
        read: returns a whole weight, given its key in a checkpoint and the index of the expert, `()` if it has none.
    """
    for chunk in chunks:
        for shard in nested_values(apply_factories_copy(chunk)):
            axes = shard.prepend_axis_num
            start = shard.global_offset[axes:]
            rows = tuple(slice(a, a + n) for a, n in zip(start, shard.data.shape, strict=True))
            shard.data.copy_(read(shard.key, shard.global_offset[:axes])[rows])


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"
