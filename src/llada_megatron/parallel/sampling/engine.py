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

    @property
    def fields(self) -> int:
        """Numbers of a row's packed statistics."""
        return Statistics.width(self.reader.reading.needs)

    def unpacked(self, packed: torch.Tensor) -> Statistics:
        """Statistics of another rank's engine, from `[rows, fields]`."""
        return Statistics.unpacked(packed, self.reader.reading.needs)

    def forward(self, work: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """This stage's layers (collective over the tensor and expert ranks of the stage).

        Args:
            work: what runs.
            hidden: `[total, 1, hidden]` from the stage before; None on the first one.

        Returns:
            `[rows, vocab / tensor_parallel]` logits on the last stage, `[total, 1, hidden]` before it.
        """
        return self._forward(work, hidden, self.memory)

    def idle(self) -> None:
        """Run one token that nobody asks for, and keep nothing: other ranks need this one in their experts' exchange.

        Every stage makes up its own input.
        """
        hidden = None
        if not self._model.pre_process:
            config = self._model.config
            hidden = torch.zeros(1, 1, config.hidden_size, dtype=config.params_dtype, device=device.current())
        self._forward(Pass.idle(0), hidden, None)

    @torch.inference_mode()
    def read(self, work: Pass, logits: torch.Tensor) -> Statistics:
        """Statistics of the rows that the pass asks for (collective over the tensor ranks of the last stage)."""
        return self.reader.read(logits, work.rows)

    @torch.inference_mode()
    def _forward(self, work: Pass, hidden: torch.Tensor | None, memory: KeyValues | None) -> torch.Tensor:
        where = device.current()
        windows = Windows(work.windows, memory, work.positions.to(where), self._seq)
        if hidden is not None:
            self._model.set_input_tensor(hidden)
        return self._model(work.tokens[None].to(where), windows, rows=work.asked[None].to(where))


def gather_over_tensor_ranks(packet: torch.Tensor) -> torch.Tensor:
    """The packets of all vocabulary shards: `[rows, numbers]` -> `[shards, rows, numbers]` (collective)."""
    shards = parallel_state.get_tensor_model_parallel_world_size()
    if shards == 1 or packet.numel() == 0:  # a pass that asks for nothing asks for it on every shard
        return packet[None].expand(shards, *packet.shape)
    parts = torch.empty(shards, *packet.shape, dtype=packet.dtype, device=packet.device)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(list(parts.unbind(0)), packet.contiguous(), group=group)
    return parts
