"""Block routing: the tokens of one block choose their experts from a few that the block chose together.

Source: the LLaDA2.2 report, equation 1. With r = sigmoid(logits) + bias, g[k, e] = max of r[t, e] over the tokens t of
block k; the `expert_capacity` experts with the highest g are open to the block, and each of its tokens takes its top_k
of r among them. Their weights are those of LLaDA2: sigmoid(logits), normalised over the chosen, times the factor.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.context_slices import held_runs, slice_starts
from llada_megatron.llada_moe.model.last_batches import LastBatches
from llada_megatron.llada_moe.model.layer import DirectLayer
from llada_megatron.llada_moe.model.patterns import FULL, begin_blocks, block_numbers, whole_sequences
from llada_megatron.llada_moe.model.windows import Windows


class BlockRouter(TopKRouter):
    """Megatron's router, whose bias closes to each token the experts that its block did not choose.

    Blocks are counted from the start of each segment, as those of block-causal attention are. They may lie on several
    ranks of sequence and context parallelism: their maxima are reduced over these ranks, unless every rank has whole
    blocks, which is known from the boundaries on the host.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, expert_capacity: int, block_size: int, **kwargs: Any
    ) -> None:
        """`expert_capacity`: experts open to a block of `block_size` positions."""
        super().__init__(config, *args, **kwargs)
        self.expert_capacity = expert_capacity
        self.block_size = block_size
        self.pattern = FULL
        """Who attends to whom: which positions a rank holds, and whether the sequences are `[x_t ; x_0]`, whose halves
        have blocks of their own."""
        self.boundaries: torch.Tensor | Windows | None = None
        """Boundaries of the segments, which `patterns` explains, or the windows of a pass; None = whole sequences."""
        self.numbered = LastBatches()
        """The blocks of the last batches, which the routers of a model share."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice, both `[tokens, experts]`, from logits `[seq, batch, experts]`."""
        kept = self.expert_bias
        self.expert_bias = self._bias_of_tokens(logits)  # Megatron adds it to the scores and does nothing else with it
        try:
            return super().routing(logits, padding_mask=padding_mask)
        finally:
            self.expert_bias = kept

    @torch.no_grad()
    def _bias_of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """The expert bias, -inf where an expert is closed: `[tokens, experts]`, sequence-major like the logits."""
        blocks, count, whole = self._blocks(*logits.shape[:2], logits.device)
        ranked = logits.float().sigmoid().flatten(0, 1) + self.expert_bias
        best = ranked.new_full((count, ranked.shape[1]), float("-inf"))
        best.scatter_reduce_(0, blocks[:, None].expand_as(ranked), ranked, "amax")
        if self.tp_cp_group.size() > 1 and not whole:
            torch.distributed.all_reduce(best, torch.distributed.ReduceOp.MAX, group=self.tp_cp_group)
        chosen = best.topk(self.expert_capacity, dim=1).indices
        closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
        return self.expert_bias.masked_fill(closed, float("-inf"))[blocks]

    def _blocks(self, seq: int, batch: int, device: torch.device) -> tuple[torch.Tensor, int, bool]:
        """Block numbers of this rank's tokens `[seq * batch]`, how many blocks all ranks have, and whether each lies on
        one rank."""
        if isinstance(self.boundaries, Windows):
            return *self.boundaries.block_numbers(self.block_size), False
        slices, place = (self.tp_group.size(), self.tp_group.rank()) if self.config.sequence_parallel else (1, 0)
        facts = self.pattern, self.block_size, seq, batch, device, slices, place
        return self.numbered.once(self.boundaries, facts, lambda: self._number(seq, batch, device, slices, place))

    def _number(
        self, seq: int, batch: int, device: torch.device, slices: int, place: int
    ) -> tuple[torch.Tensor, int, bool]:
        """The same, numbered: this rank holds slice `place` of `slices` of what its context rank holds."""
        ranks = self.cp_group.size()
        whole = seq * slices * ranks
        length = whole // self.pattern.copies
        boundaries = whole_sequences(batch * whole // length, length) if self.boundaries is None else self.boundaries
        runs = held_runs(whole, self.cp_group.rank(), ranks, self.pattern)
        mine = torch.cat([torch.arange(*run, device=device) for run in runs])[place * seq : (place + 1) * seq]
        positions = mine[:, None] + torch.arange(batch, device=device) * whole
        starts = torch.tensor(slice_starts(whole, ranks, self.pattern, slices))
        alone = begin_blocks(boundaries, self.block_size, starts + torch.arange(batch)[:, None] * whole)
        return *block_numbers(boundaries, self.block_size, positions.flatten()), alone


class BlockRoutedLayer(DirectLayer):
    """A layer whose router knows the segments.

    They are an argument of the layer, so that a layer that is run again in the backward pass sees its own.
    """

    def forward(self, *args: Any, attention_mask: torch.Tensor | Windows | None = None, **kwargs: Any) -> Any:
        """Run Megatron's layer; `attention_mask` holds segment boundaries of whole sequences, or a pass's windows."""
        self.mlp.router.boundaries = attention_mask
        return super().forward(*args, attention_mask=attention_mask, **kwargs)
