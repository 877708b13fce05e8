"""Routed experts without Transformer Engine: Megatron's SequentialMLP, computed as one differentiable operation.

Parameters, their names, their sharding and the checkpoint are SequentialMLP's own; only how the arithmetic is driven
differs. Megatron runs a dozen autograd operations per expert, whose overhead on a CPU rivals the products of a small
expert; here one operation walks over the experts, writes each product in its place, and keeps for the backward pass
only the inputs and the products before the activation.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn.functional import silu

_silu_backward = torch.ops.aten.silu_backward


class PermutedExperts(SequentialMLP):
    """SwiGLU experts over tokens that the dispatcher has sorted by expert."""

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Runs each expert on its rows and scales by the router's weight (before the second product, as Megatron does).

        Args:
            permuted_local_hidden_states: `[tokens, hidden]`, sorted by expert.
            tokens_per_expert: `[experts]` on this rank; their sum is `tokens`.
            permuted_probs: `[tokens]`.

        Returns:
            `[tokens, hidden]` (under expert-tensor parallelism this rank's summand), and no bias.
        """
        first = [expert.linear_fc1.weight for expert in self.local_experts]
        second = [expert.linear_fc2.weight for expert in self.local_experts]
        counts = tokens_per_expert.tolist()
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """y[e] = (silu(x[e] G_e^T) * (x[e] U_e^T) * p[e]) D_e^T for the rows of each expert e; first = [G_e; U_e]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, probs: torch.Tensor, counts: list[int], *weights: torch.Tensor
    ) -> torch.Tensor:
        experts = len(counts)
        both = x.new_empty(x.size(0), weights[0].size(0))
        y = x.new_empty(x.size(0), weights[experts].size(0))
        for e, rows in _slices(counts):
            torch.mm(x[rows], weights[e].t(), out=both[rows])
            gate, up = both[rows].chunk(2, dim=-1)
            scaled = silu(gate).mul_(up).mul_(probs[rows, None].to(x.dtype))
            torch.mm(scaled, weights[experts + e].t(), out=y[rows])
        ctx.counts = counts
        ctx.save_for_backward(x, probs, both, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probs, both, *weights = ctx.saved_tensors
        experts, dy = len(ctx.counts), dy.contiguous()
        dx, dprobs = torch.empty_like(x), torch.zeros_like(probs)
        gradients = [
            torch.empty_like(w) if c else torch.zeros_like(w) for w, c in zip(weights, ctx.counts * 2, strict=True)
        ]
        for e, rows in _slices(ctx.counts):
            gate, up = both[rows].chunk(2, dim=-1)
            scale = probs[rows, None].to(x.dtype)
            active = silu(gate)
            product = active * up
            d_scaled = torch.mm(dy[rows], weights[experts + e])
            torch.sum(d_scaled * product, dim=-1, out=dprobs[rows])
            torch.mm(dy[rows].t(), product.mul_(scale), out=gradients[experts + e])
            d_product = d_scaled.mul_(scale)
            d_both = torch.cat([_silu_backward(d_product * up, gate), d_product.mul_(active)], dim=-1)
            torch.mm(d_both, weights[e], out=dx[rows])
            torch.mm(d_both.t(), x[rows], out=gradients[e])
        return dx, dprobs, None, *gradients


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """Experts that have tokens, each with its rows."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
