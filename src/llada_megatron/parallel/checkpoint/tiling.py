"""Boxes of a tensor: offsets and sizes along each axis. Whether some fill it, and what two have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Numbers = tuple[int, ...]


class Box(NamedTuple):
    """Where a part of a tensor begins and how far it reaches, axis by axis."""

    offsets: Numbers
    sizes: Numbers

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def common(self, other: Box) -> Box | None:
        """What lies in both, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of the tensor that holds `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def tiling_fault(shape: Numbers, boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not fill a tensor of `shape` exactly once, or None."""
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            return f"has a part with {len(box.sizes)} axes"
        if any(a < 0 or n < 1 or a + n > size for a, n, size in zip(*box, shape, strict=True)):
            return f"has a part outside its shape, at {list(box.offsets)}"
    held, expected = sum(box.volume for box in boxes), math.prod(shape)
    ordered = sorted(boxes)
    for number, box in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if shape and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if box.common(other):
                return f"has two parts that overlap, at {list(other.offsets)}"
    return None if held == expected else f"has parts of {held:,} elements together instead of {expected:,}"
