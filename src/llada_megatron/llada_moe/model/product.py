"""The product of activations and a weight in evaluation, by the faster of the two libraries that torch has for a CPU.

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
