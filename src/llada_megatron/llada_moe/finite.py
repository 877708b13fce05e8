"""Whether a tensor holds finite numbers only, and where it does not."""

from __future__ import annotations

import torch

_CHUNK = 4 * 2**20
"""Elements that are examined one by one at a time."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element of a tensor of any shape is NaN or infinite; it takes one pass and no further memory."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize < 2:  # 8-bit kinds have no kernel for extremes
        return bool(torch.isfinite(tensor.float()).all())
    lowest, highest = torch.aminmax(tensor)  # both are NaN if any element is
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def first_not_finite(tensor: torch.Tensor) -> tuple[tuple[int, ...], float] | None:
    """Position and value of the first element that is NaN or infinite; None if there is none."""
    if is_finite(tensor):
        return None
    values = tensor.reshape(-1)
    for start, chunk in zip(range(0, len(values), _CHUNK), values.split(_CHUNK), strict=True):
        wrong = ~torch.isfinite(chunk if chunk.itemsize > 1 else chunk.float())
        if wrong.any():
            first = start + int(wrong.int().argmax())
            place = torch.unravel_index(torch.tensor(first), tensor.shape)
            return tuple(int(index) for index in place), float(values[first])
    return None
