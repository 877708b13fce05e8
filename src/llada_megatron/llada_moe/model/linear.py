"""Megatron's parallel linear layers, which compute a plain product in evaluation, by the faster library for it.

Parameters, their names and their sharding are Megatron's own, and so is the path that training takes. Megatron drives
each product through two or three autograd functions, whose overhead exceeds the product of a window of a few positions;
without gradients they have nothing to record.

In float32 torch gives every product on a CPU to MKL, which on processors that are not Intel's leaves AVX-512 unused:
on an AMD EPYC it reaches 80 GFLOP/s where oneDNN reaches 130 at 32 rows, and 85 where that reaches 180 at 178 rows
(one thread, weights of 1536 x 256). Both compute in IEEE float32; sums are taken in another order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

_PROCESSORS = Path("/proc/cpuinfo")

_allowed = True


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[..., input]` times `[output, input]`^T: `[..., output]`. Without gradients."""
    if _allowed and x.device.type == "cpu" and x.dtype is torch.float32 and x.numel() and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch's own choice is the slower one here: oneDNN is there, and the processor is not Intel's."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return _PROCESSORS.exists() and "AuthenticAMD" in _PROCESSORS.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """Leave every product to torch's choice, to measure what the other one gains."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


class ColumnLinear(ColumnParallelLinear):
    """Y_i = X W_i^T: every tensor rank holds rows of the weight and gives columns of the output."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Megatron's layer computes.

        Args:
            input_: `[..., input]`, equal on all tensor ranks; under sequence parallelism this rank's positions.

        Returns:
            `[..., output / tensor_parallel]`, and the bias that was not added.
        """
        if not plain(self) or self.gather_output or runtime_gather_output:
            return super().forward(input_, weight, runtime_gather_output)
        return product(input_, self.weight if weight is None else weight), None


class RowLinear(RowParallelLinear):
    """Y = sum_i X_i W_i^T: every tensor rank holds columns of the weight and of the input."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Megatron's layer computes.

        Args:
            input_: `[..., input / tensor_parallel]`.

        Returns:
            `[..., output]`, equal on all tensor ranks (under sequence parallelism this rank's positions), and the bias
            that was not added.
        """
        if not plain(self) or not self.input_is_parallel:
            return super().forward(input_)
        output = product(input_, self.weight)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(output, group=self.tp_group)
        return output, None


def unrecorded(module: torch.nn.Module) -> bool:
    """Whether the module runs for its output alone: in evaluation mode, and without gradients."""
    return not (module.training or torch.is_grad_enabled())


def plain(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether the layer is its product and the sum over ranks, and nothing more."""
    return unrecorded(layer) and not (layer.sequence_parallel or layer.explicit_expert_comm or layer.bias is not None)
