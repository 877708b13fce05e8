"""Routed experts whose own matrices are frozen, alone or with low-rank factors beside them (`lora`).

The operation of `experts` and the grouped one compute the gradient of every matrix; here each product is a step of its
own, which gives a gradient to the matrices that are trained only.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn.functional import silu

from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.lora import ExpertFactors, expert_factors

Rows = torch.Tensor | list[int]
"""Which rows each expert has: where they end, int32 `[experts]` on the device, for grouped products, or how many."""


def forward(experts: SequentialMLP, x: torch.Tensor, probs: torch.Tensor, rows: Rows) -> torch.Tensor:
    """y[e] = (silu(x[e] G_e^T) * (x[e] U_e^T) * p[e]) D_e^T, with factors added to [G; U] and D where there are some.

    Args:
        x: `[tokens, hidden]`, sorted by expert.
        probs: `[tokens]`.

    Returns:
        `[tokens, hidden]` (under expert-tensor parallelism this rank's summand).
    """
    first, second = expert_factors(experts)
    both = _adapted_product(x, rows, [expert.linear_fc1.weight for expert in experts.local_experts], first)
    gate, up = both.chunk(2, dim=-1)
    scaled = silu(gate) * up * probs.unsqueeze(-1).to(x.dtype)
    return _adapted_product(scaled, rows, [expert.linear_fc2.weight for expert in experts.local_experts], second)


def _adapted_product(
    x: torch.Tensor, rows: Rows, weights: list[torch.Tensor], factors: ExpertFactors | None
) -> torch.Tensor:
    """x[e] W_e^T + s (x[e] A_e^T) B_e^T `[tokens, output]`."""
    y = _Product.apply(x, rows, *weights)
    if factors is None:
        return y
    a, b, scale = factors
    return y + _Product.apply(_Product.apply(x, rows, *a) * scale, rows, *b)


class _Product(torch.autograd.Function):
    """The rows of each expert e of x `[tokens, input]` times W_e^T, W_e `[output, input]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Rows, *weights: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.trained = rows, any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if ctx.trained else None, *weights)
        if isinstance(rows, torch.Tensor):
            return grouped.grouped_product(x, grouped.stacked(weights).transpose(1, 2), rows)
        return torch.cat([part @ weight.t() for part, weight in zip(x.split(rows), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, dy = ctx.rows, dy.contiguous()
        gradients: Any = [None] * len(weights)
        if isinstance(rows, torch.Tensor):
            dx = grouped.grouped_product(dy, grouped.stacked(weights), rows)
            if ctx.trained:
                gradients = grouped.grouped_product(dy.t(), x, rows).unbind()
            return dx, None, *gradients
        parts = dy.split(rows)
        dx = torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
        if ctx.trained:
            gradients = [part.t() @ taken for part, taken in zip(parts, x.split(rows), strict=True)]
        return dx, None, *gradients
