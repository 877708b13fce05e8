"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.linear import unrecorded


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that tells Megatron to sum its gradient over the tensor ranks under sequence parallelism.

    PyTorch has a fused kernel for CUDA only; on a CPU a formula with a third of its passes over memory takes the place
    of the chain of elementwise operations.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        if torch.cuda.is_available() and not self.weight.is_meta:
            self.to(torch.cuda.current_device())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[..., hidden]`."""
        if x.device.type != "cpu" or not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        if unrecorded(self):
            return x.mul(_scale(x, self.eps)).mul_(self.weight)
        return _Normalize.apply(x, self.weight, self.eps)


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps): `[..., 1]`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class _Normalize(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps); dx = r (dy w - n mean(dy w n)), dw = sum dy n."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _scale(x, eps)
        normalized = x * scale
        ctx.save_for_backward(normalized, weight, scale)
        return normalized * weight

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normalized, weight, scale = ctx.saved_tensors
        product = (dy * normalized).flatten(0, -2)
        mean = (product @ weight).div_(weight.numel()).view_as(scale)
        dx = (dy * weight).addcmul_(normalized, mean, value=-1).mul_(scale)
        return dx, product.sum(dim=0), None
