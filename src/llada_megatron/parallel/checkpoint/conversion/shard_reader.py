"""Slices of the weights of a sharded checkpoint, read for conversion: no process group, and nothing in it is run.

`.metadata` is read by an unpickler that knows only descriptions of tensors, the file names are those of the manifest,
and a saved shard is parsed with `weights_only`. A shard is what `torch.save` made of one tensor. torch can parse it
without its values: loaded to the meta device, a storage knows where its bytes are (`_checkpoint_offset`,
torch/serialization.py, `_load`). Where an older torch says nothing, or the tensor is not contiguous, the shard is read
whole.
"""

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
    """A saved part of a weight: where it is stored, which part it is, and its dtype."""

    path: Path
    offset: int
    length: int
    """Bytes of the shard, from `offset` on."""
    box: Box
    dtype: torch.dtype


def read_shard(shard: SavedShard, part: Box) -> torch.Tensor:
    """The elements of `part`, a box inside the shard's, both in coordinates of the whole weight.

    Returns:
        a tensor of the part's sizes, in memory of its own.

    Raises:
        CheckpointError: the shard is no tensor, not the one that the checkpoint describes, or incomplete.
    """
    try:
        with shard.path.open("rb") as stream:
            saved = _parse(stream, shard, "meta")
            start = getattr(saved.untyped_storage(), "_checkpoint_offset", None)
            if start is not None and saved.is_contiguous():
                start += saved.storage_offset() * saved.itemsize
                return _read_rows(stream, shard, start, part.inside(shard.box))
            return _parse(stream, shard, "cpu")[part.inside(shard.box)].clone()
    except OSError as error:
        raise CheckpointError(f"{shard.path} cannot be read ({error.strerror})") from None


def _parse(stream: BinaryIO, shard: SavedShard, device: str) -> torch.Tensor:
    where = f"{shard.path}, {shard.length:,} bytes from {shard.offset:,}"
    try:
        view = io.BufferedReader(_View(stream.fileno(), shard.offset, shard.length))
        found: Any = torch.load(view, map_location=device, weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(f"{where}: not a saved tensor ({type(error).__name__}: {reason})") from None
    if type(found) is not torch.Tensor or found.layout is not torch.strided:
        raise CheckpointError(f"{where}: holds {_kind(found)} instead of a plain tensor")
    if (found.dtype, tuple(found.shape)) != (shard.dtype, shard.box.sizes):
        what = f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(f"{where}: holds {what} instead of {shard.dtype} {list(shard.box.sizes)}")
    return found


def _kind(found: Any) -> str:
    return f"a tensor of layout {found.layout}" if type(found) is torch.Tensor else f"a {type(found).__name__}"


def _read_rows(stream: BinaryIO, shard: SavedShard, start: int, slices: tuple[slice, ...]) -> torch.Tensor:
    """Read the shortest run of rows around `slices` of a contiguous tensor whose values begin at byte `start`."""
    sizes, lead = shard.box.sizes, 0
    while lead < len(sizes) - 1 and slices[lead].stop - slices[lead].start == 1:
        lead += 1
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    first = sum(cut.start * stride for cut, stride in zip(slices[: lead + 1], strides, strict=False))
    rows = slices[lead].stop - slices[lead].start
    start += first * shard.dtype.itemsize
    values = torch.empty((*(1,) * lead, rows, *sizes[lead + 1 :]), dtype=shard.dtype)
    if start < 0 or start + values.nbytes > shard.length:
        raise CheckpointError(f"{shard.path}: the tensor at {shard.offset:,} reaches beyond its shard")
    done = read_into(stream.fileno(), shard.offset + start, values)
    if done < values.nbytes:
        raise CheckpointError(f"{shard.path} ends at {shard.offset + start + done:,}, in the middle of a tensor")
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
    """A step directory opened for reading. Threads may share it; it holds no tensor and no open file."""

    def __init__(self, directory: str | Path) -> None:
        """Read the manifest and `.metadata`, and check that the files are there with the stated sizes.

        Args:
            directory: a step directory, whatever layout wrote it.

        Raises:
            DamagedCheckpointError: it is incomplete.
            CheckpointError: it is unsafe, or describes a weight in an impossible way.
        """
        self.directory = Path(directory).absolute()
        self.manifest = manifests.read(self.directory)
        manifests.verify_sizes(self.directory, self.manifest)
        found = safety.read_metadata(self.directory, self.manifest.files)
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """dtype and global shape of every weight of the model, without the optimizer's state."""
        self._shards: dict[str, list[SavedShard]] = {}
        places = self._places(found)
        for key, value in found.state_dict_metadata.items():
            if isinstance(value, metadata.TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX):
                self._add(key, value, places[key])

    def read(self, key: str, index: tuple[int, ...] = (), start: int = 0, stop: int | None = None) -> torch.Tensor:
        """`tensor[index][start:stop]` of the weight `key`, as contiguous memory of its own on the host.

        Only the rows that are asked for are read.

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
        common = [(shard, part) for shard in self._shards[key] if (part := shard.box.common(wanted))]
        if len(common) == 1:
            return read_shard(*common[0]).reshape(wanted.sizes[lead:])
        whole = torch.empty(wanted.sizes, dtype=dtype)
        for shard, part in common:
            whole[part.inside(wanted)] = read_shard(shard, part)
        return whole.reshape(wanted.sizes[lead:])

    def verify(self, name: str, advance: Callable[[int], object] = lambda count: None) -> None:
        """Compare the file `name` of the manifest with its SHA-256; `advance` is called with the bytes of each read.

        Raises:
            DamagedCheckpointError: it does not hold the bytes that were written.
        """
        fault = manifests.verify_digest(self.directory, name, self.manifest.files[name], advance)
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
            shards = [] if fault else [self._shard(box, dtype, places[box.offsets]) for box in boxes]
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            fault = f"is described in a way that makes no sense ({type(error).__name__}: {error})"
        if fault:
            raise CheckpointError(f"{self.directory / safety.METADATA}: {key!r} {fault}")
        self.tensors[key], self._shards[key] = (dtype, shape), shards

    def _shard(self, box: Box, dtype: torch.dtype, place: Any) -> SavedShard:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype {dtype!r}")
        if place.offset + place.length > self.manifest.files[place.relative_path].size:
            raise ValueError(f"{place.relative_path} ends before {place.offset + place.length:,}")
        return SavedShard(self.directory / place.relative_path, place.offset, place.length, box, dtype)


def _numbers(values: Any) -> tuple[int, ...]:
    """The values as a plain tuple. Raises TypeError if they are not integers."""
    if not isinstance(values, tuple) or any(type(value) is not int for value in values):
        raise TypeError(f"{values!r} is not a shape")
    return tuple(values)
