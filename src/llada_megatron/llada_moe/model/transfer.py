"""From the host to the device without waiting.

A copy from ordinary memory is one that CUDA ends before it returns, after all the work that the device was given
before. From page-locked ("pinned") memory it is one more item in the device's queue, and the host goes on.
"""

from __future__ import annotations

import torch


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor in page-locked memory where there is CUDA, else as it is."""
    return tensor.pin_memory() if torch.cuda.is_available() and tensor.device.type == "cpu" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`; the host waits for nothing.

    torch keeps the pinned memory until the copy is done, whoever drops it before.
    """
    return pinned(tensor).to(device, non_blocking=True)
