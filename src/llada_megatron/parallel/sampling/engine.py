"""Runs the passes of a group on this rank's part of the model, and reads the rows they ask for."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.model.windows import KeyValues, Windows
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import Reader, Statistics
from llada_megatron.parallel import device


class Engine:
    """One rank's part of the work on a group, and the keys and values that its layers keep for it."""

    def __init__(self, model: DiffusionTransformer, method: Method, slots: int, seq: int) -> None:
        """For a group of `slots` sequences of up to `seq` positions."""
        self._model = model
        self._seq = seq
        twins = 2 if method.reading.guidance else 1
        self.memory = KeyValues(slots * twins, seq) if method.cache.keeps else None
        shard = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first_id = parallel_state.get_tensor_model_parallel_rank() * shard
        self.reader = Reader(method.reading, first_id, gather_over_tensor_ranks)

    @torch.inference_mode()
    def run(self, work: Pass) -> Statistics:
        """One pass through all layers, where this rank has them all (collective over the tensor and expert ranks)."""
        return self.read(work, self.forward(work))

    @torch.inference_mode()
    def forward(self, work: Pass) -> torch.Tensor:
        """This stage's layers.

        Returns:
            `[rows, vocab / tensor_parallel]` logits on the last stage, `[total, 1, hidden]` before it.
        """
        where = device.current()
        windows = Windows(work.windows, self.memory, work.positions.to(where), self._seq)
        return self._model(work.tokens[None].to(where), windows, rows=work.asked[None].to(where))

    @torch.inference_mode()
    def read(self, work: Pass, logits: torch.Tensor) -> Statistics:
        """Statistics of the rows that the pass asks for (collective over the tensor ranks of the last stage)."""
        return self.reader.read(logits, work.rows)


def gather_over_tensor_ranks(packet: torch.Tensor) -> torch.Tensor:
    """The packets of all vocabulary shards: `[rows, numbers]` -> `[shards, rows, numbers]`."""
    shards = parallel_state.get_tensor_model_parallel_world_size()
    if shards == 1:
        return packet[None]
    parts = [torch.empty_like(packet) for _ in range(shards)]
    torch.distributed.all_gather(parts, packet.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.stack(parts)
