"""What low-rank factors add to a weight, for training and for conversions, which do without Megatron."""

from __future__ import annotations

import torch


def product_of_factors(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """s B A in float32, `[output, input]`, of A `[rank, input]` and B `[output, rank]`."""
    return torch.mm(b.float(), a.float()).mul_(scale)
