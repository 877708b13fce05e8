"""Weights of a sharded checkpoint read in slices, for conversion: no process group, nothing that is in it is run."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint import metadata

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.storage import read_into
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from llada_megatron.parallel.checkpoint.conversion.placement import Box, tiling_fault
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError


class SavedShard(NamedTuple):
    """Where a saved part of a tensor is, and what it must be."""

    path: Path
    offset: int
    length: int
    """Bytes of the entry, from `offset` on."""
    box: Box
    dtype: torch.dtype


def read_part(entry: SavedShard, part: Box) -> torch.Tensor:
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


def _parse(stream: BinaryIO, entry: SavedShard, device: str) -> torch.Tensor:
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


def _read_rows(stream: BinaryIO, entry: SavedShard, start: int, slices: tuple[slice, ...]) -> torch.Tensor:
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


OPTIMIZER_PREFIX = "optimizer."


class ShardedReader:
    """A step directory opened for reading. Threads may share one; it keeps no tensor and no open file."""

    def __init__(self, directory: str | Path) -> None:
        """Read what the checkpoint says of itself; the files are there and have the stated sizes.

        Args:
            directory: a step directory, whatever layout wrote it.

        Raises:
            DamagedCheckpointError: incomplete.
            CheckpointError: unsafe, or its description of a weight is impossible.
        """
        self.directory = Path(directory).absolute()
        self._manifest = manifests.read(self.directory)
        manifests.verify_sizes(self.directory, self._manifest)
        found = safety.read_metadata(self.directory, self._manifest.files)
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """dtype and global shape of every model weight; the optimizer's state is left out."""
        self._entries: dict[str, list[SavedShard]] = {}
        places = self._places(found)
        for key, value in found.state_dict_metadata.items():
            if isinstance(value, metadata.TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX):
                self._add(key, value, places[key])

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the run."""
        return self._manifest.facts

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(stated.size for stated in self._manifest.files.values())

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, as the manifest states it."""
        return {name: stated.sha256 for name, stated in self._manifest.files.items()}

    def read(self, key: str, index: tuple[int, ...] = (), start: int = 0, stop: int | None = None) -> torch.Tensor:
        """`tensor[index][start:stop]` of the weight `key`, as contiguous memory of its own on the host.

        Reads the rows that are asked for and no others.

        Args:
            key: one of `tensors`.
            index: positions on the leading axes, fewer than the tensor has.
            start, stop: rows of the axis after them.

        Raises:
            CheckpointError: there is no such weight, or its bytes are not what the checkpoint describes.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.directory} has no weight {key!r}")
        dtype, shape = self.tensors[key]
        lead = len(index)
        stop = shape[lead] if stop is None else stop
        if any(not 0 <= i < n for i, n in zip(index, shape, strict=False)) or not 0 <= start < stop <= shape[lead]:
            raise IndexError(f"{key} {list(shape)} has no part {list(index)}[{start}:{stop}]")
        wanted = Box(
            (*index, start, *(0 for _ in shape[lead + 1 :])), (*(1 for _ in index), stop - start, *shape[lead + 1 :])
        )
        common = [(entry, part) for entry in self._entries[key] if (part := entry.box.common(wanted))]
        if len(common) == 1:
            return read_part(*common[0]).reshape(wanted.sizes[lead:])
        whole = torch.empty(wanted.sizes, dtype=dtype)
        for entry, part in common:
            whole[part.inside(wanted)] = read_part(entry, part)
        return whole.reshape(wanted.sizes[lead:])

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: stated.size for name, stated in self._manifest.files.items()}

    def verify(self, name: str, advance: Callable[[int], object] = lambda count: None) -> None:
        """Compare the file `name`, one of `digests`, with its SHA-256; `advance` learns of bytes as they are read.

        Raises:
            DamagedCheckpointError: it does not hold the bytes that were written.
        """
        fault = manifests.verify_digest(self.directory, name, self._manifest.files[name], advance)
        if fault:
            raise DamagedCheckpointError(fault)

    def _places(self, found: metadata.Metadata) -> dict[str, dict[tuple[int, ...], Any]]:
        """Where each part of each tensor is stored, by key and offsets."""
        places: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
        for index, place in found.storage_data.items():
            if type(index.fqn) is str and isinstance(index.offset, tuple):
                places[index.fqn][tuple(index.offset)] = place
        return places

    def _add(self, key: str, value: metadata.TensorStorageMetadata, places: dict[tuple[int, ...], Any]) -> None:
        try:
            dtype, shape = value.properties.dtype, _numbers(value.size)
            boxes = [Box(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in value.chunks]
            fault = tiling_fault(shape, boxes) if shape else "has no axes"
            entries = [] if fault else [self._entry(box, dtype, places[box.offsets]) for box in boxes]
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            fault = f"is described in a way that makes no sense ({type(error).__name__}: {error})"
        if fault:
            raise CheckpointError(f"{self.directory / safety.METADATA}: {key!r} {fault}")
        self.tensors[key], self._entries[key] = (dtype, shape), entries

    def _entry(self, box: Box, dtype: torch.dtype, place: Any) -> SavedShard:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype {dtype!r}")
        if place.offset + place.length > self._manifest.files[place.relative_path].size:
            raise ValueError(f"{place.relative_path} ends before {place.offset + place.length:,}")
        return SavedShard(self.directory / place.relative_path, place.offset, place.length, box, dtype)


def _numbers(values: Any) -> tuple[int, ...]:
    """The values as a plain tuple. Raises TypeError if they are not integers."""
    if not isinstance(values, tuple) or any(type(value) is not int for value in values):
        raise TypeError(f"{values!r} is not a shape")
    return tuple(values)
