"""Routed experts without Transformer Engine: Megatron's SequentialMLP, computed as one differentiable operation.

Parameters, their names, their sharding and the checkpoint are SequentialMLP's own; only how the arithmetic is driven
differs. Megatron runs a dozen autograd operations per expert, whose overhead on a CPU rivals the products of a small
expert; here one operation walks over the experts, writes each product in its place, and keeps for the backward pass
only the inputs and the products before the activation. On a GPU in bfloat16 the walk gives way to grouped products
(`model.grouped`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from llada_megatron.llada_moe.model import frozen_experts, grouped
from llada_megatron.llada_moe.model.linear import unrecorded
from llada_megatron.llada_moe.model.lora import has_factors

_silu_backward = torch.ops.aten.silu_backward


class PermutedExperts(SequentialMLP):
    """SwiGLU experts over tokens that the dispatcher has sorted by expert."""

    main_gradients: grouped.MainGradients | None = None
    """Set where the gradients of the experts lie side by side in Megatron's buffer."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False  # Megatron's linear layers would ask for Apex, and never run here
        super().__init__(num_local_experts, own, *args, **kwargs)
        if torch.cuda.is_available():
            self.local_experts = grouped.RegisteredBackwards(list(self.local_experts))

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
        x, probs = permuted_local_hidden_states, permuted_probs
        first, second = expert_weights(self)
        at_once = grouped.usable(x, first)
        if has_factors(self) or not (unrecorded(self) or first[0].requires_grad):
            rows = grouped.ends_of(tokens_per_expert, x.device) if at_once else tokens_per_expert.tolist()
            return frozen_experts.forward(self, x, probs, rows), None
        if at_once:
            ends = grouped.ends_of(tokens_per_expert, x.device)
            if unrecorded(self):
                return grouped.forward(x, probs, ends, grouped.stacked(first), grouped.stacked(second))[0], None
            return grouped.GroupedExperts.apply(x, probs, ends, self.main_gradients, *first, *second), None
        counts = tokens_per_expert.tolist()
        if unrecorded(self):
            return self._unrecorded(x, probs, counts), None
        return _Experts.apply(x, probs, counts, *first, *second), None

    def _unrecorded(self, x: torch.Tensor, probs: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The forward pass without a graph: the activation of all experts at once, the weights of those with tokens."""
        experts = list(self.local_experts)
        both = x.new_empty(x.size(0), experts[0].linear_fc1.weight.size(0))
        for e, (x_e, both_e) in _by_expert(counts, x, both):
            torch.mm(x_e, experts[e].linear_fc1.weight.t(), out=both_e)
        gate, up = both.chunk(2, dim=-1)
        product = silu(gate).mul_(up).mul_(probs.unsqueeze(-1).to(x.dtype))
        y = torch.empty_like(x)
        for e, (product_e, y_e) in _by_expert(counts, product, y):
            torch.mm(product_e, experts[e].linear_fc2.weight.t(), out=y_e)
        return y


def expert_weights(experts: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The first matrices `[2 * ffn, hidden]` and the second ones `[hidden, ffn]` of SequentialMLP or TEGroupedMLP."""
    if isinstance(experts, SequentialMLP):
        pairs = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in experts.local_experts]
        return [first for first, _ in pairs], [second for _, second in pairs]
    count = range(experts.num_local_experts)
    first, second = experts.linear_fc1, experts.linear_fc2
    return [getattr(first, f"weight{i}") for i in count], [getattr(second, f"weight{i}") for i in count]


class _Experts(torch.autograd.Function):
    """y[e] = (silu(x[e] G_e^T) * (x[e] U_e^T) * p[e]) D_e^T for the rows of each expert e; first = [G_e; U_e]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, probs: torch.Tensor, counts: list[int], *weights: torch.Tensor
    ) -> torch.Tensor:
        first, second = weights[: len(counts)], weights[len(counts) :]
        both = x.new_empty(x.size(0), first[0].size(0))
        y = x.new_empty(x.size(0), second[0].size(0))
        scale = probs.unsqueeze(-1).to(x.dtype)
        rows = _by_expert(counts, x, both, *both.chunk(2, dim=-1), scale, y)
        for e, (x_e, both_e, gate, up, scale_e, y_e) in rows:
            torch.mm(x_e, first[e].t(), out=both_e)
            torch.mm(silu(gate).mul_(up).mul_(scale_e), second[e].t(), out=y_e)
        ctx.counts = counts
        ctx.save_for_backward(x, probs, both, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        counts = ctx.counts
        x, probs, both, *weights = ctx.saved_tensors
        first, second = weights[: len(counts)], weights[len(counts) :]
        dx, dprobs = torch.empty_like(x), torch.zeros_like(probs)
        # an expert without tokens has a gradient of zero
        empty = (torch.empty_like if count else torch.zeros_like for count in counts * 2)
        gradients = [make(weight) for make, weight in zip(empty, weights, strict=True)]
        scale = probs.unsqueeze(-1).to(x.dtype)
        rows = _by_expert(counts, x, *both.chunk(2, dim=-1), scale, dy.contiguous(), dx, dprobs)
        for e, (x_e, gate, up, scale_e, dy_e, dx_e, dprobs_e) in rows:
            active = silu(gate)
            product = active * up
            d_scaled = torch.mm(dy_e, second[e])
            torch.sum(d_scaled * product, dim=-1, out=dprobs_e)
            torch.mm(dy_e.t(), product.mul_(scale_e), out=gradients[len(counts) + e])
            d_product = d_scaled.mul_(scale_e)
            d_both = torch.cat([_silu_backward(d_product * up, gate), d_product.mul_(active)], dim=-1)
            torch.mm(d_both, first[e], out=dx_e)
            torch.mm(d_both.t(), x_e, out=gradients[e])
        return dx, dprobs, None, *gradients


def _by_expert(counts: list[int], *tensors: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Experts that have tokens, each with its rows of the tensors."""
    parts = zip(*(tensor.split(counts) for tensor in tensors), strict=True)
    return ((expert, rows) for expert, rows in enumerate(parts) if counts[expert])
