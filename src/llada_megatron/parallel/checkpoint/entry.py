"""One saved tensor inside a `.distcp` file: a few of its rows, without reading the others and without running it.

An entry is what `torch.save` made of one tensor. torch can parse one without its values: loaded to the meta device,
a storage knows where its bytes are (`_checkpoint_offset`, torch/serialization.py, `_load`). Where an older torch says
nothing, or the tensor is not contiguous, the entry is read whole.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.storage import read_into
from llada_megatron.parallel.checkpoint.tiling import Box


class Entry(NamedTuple):
    """Where a saved part of a tensor is, and what it must be."""

    path: Path
    offset: int
    length: int
    """Bytes of the entry, from `offset` on."""
    box: Box
    dtype: torch.dtype


def read_part(entry: Entry, part: Box) -> torch.Tensor:
    """The elements of `part`, a box inside the entry's, in the global tensor's coordinates.

    Returns:
        a tensor of the part's sizes, in its own memory.

    Raises:
        CheckpointError: the entry is no tensor, not the one that the checkpoint describes, or incomplete.
    """
    try:
        with entry.path.open("rb") as stream:
            saved = _parse(stream, entry, "meta")
            start = getattr(saved.untyped_storage(), "_checkpoint_offset", None)
            if start is not None and saved.is_contiguous():
                start += saved.storage_offset() * saved.itemsize
                return _read_rows(stream, entry, start, part.inside(entry.box))
            return _parse(stream, entry, "cpu")[part.inside(entry.box)].clone()
    except OSError as error:
        raise CheckpointError(f"{entry.path} cannot be read ({error.strerror})") from None


def _parse(stream: BinaryIO, entry: Entry, device: str) -> torch.Tensor:
    where = f"{entry.path}, {entry.length:,} bytes from {entry.offset:,}"
    try:
        view = io.BufferedReader(_View(stream.fileno(), entry.offset, entry.length))
        found: Any = torch.load(view, map_location=device, weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(f"{where}: not a saved tensor ({type(error).__name__}: {reason})") from None
    if type(found) is not torch.Tensor or found.layout is not torch.strided:
        raise CheckpointError(f"{where}: holds {_kind(found)} instead of a plain tensor")
    if (found.dtype, tuple(found.shape)) != (entry.dtype, entry.box.sizes):
        what = f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(f"{where}: holds {what} instead of {entry.dtype} {list(entry.box.sizes)}")
    return found


def _kind(found: Any) -> str:
    return f"a tensor of layout {found.layout}" if type(found) is torch.Tensor else f"a {type(found).__name__}"


def _read_rows(stream: BinaryIO, entry: Entry, start: int, slices: tuple[slice, ...]) -> torch.Tensor:
    """Read the shortest run of rows around `slices` of a contiguous tensor whose values begin at byte `start`."""
    sizes, lead = entry.box.sizes, 0
    while lead < len(sizes) - 1 and slices[lead].stop - slices[lead].start == 1:
        lead += 1
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    first = sum(cut.start * stride for cut, stride in zip(slices[: lead + 1], strides, strict=False))
    rows = slices[lead].stop - slices[lead].start
    start += first * entry.dtype.itemsize
    values = torch.empty((*(1,) * lead, rows, *sizes[lead + 1 :]), dtype=entry.dtype)
    if start < 0 or start + values.nbytes > entry.length:
        raise CheckpointError(f"{entry.path}: the tensor at {entry.offset:,} reaches beyond its entry")
    done = read_into(stream.fileno(), entry.offset + start, values)
    if done < values.nbytes:
        raise CheckpointError(f"{entry.path} ends at {entry.offset + start + done:,}, in the middle of a tensor")
    return values[(*(slice(None),) * (lead + 1), *slices[lead + 1 :])].contiguous()


class _View(io.RawIOBase):
    """Bytes `[offset, offset + length)` of an open file, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [target], self._offset + self._position) if target else 0
        self._position += count
        return count
