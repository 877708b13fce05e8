"""Writes .safetensors files in rows, which the library cannot: its `save_file` needs all tensors of a file in memory.

So a file may be larger than memory. The index of several files is written here too.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from llada_megatron.llada_moe.errors import CheckpointError, LladaError, ResourceError
from llada_megatron.llada_moe.huggingface.safetensors_header import DTYPES, METADATA
from llada_megatron.llada_moe.huggingface.safetensors_reader import INDEX_NAME
from llada_megatron.llada_moe.storage import Writeback

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def shard_name(number: int, count: int) -> str:
    """File name of shard `number`, counted from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


class ShardWriter:
    """One .safetensors file: the header is written first, then the tensors in the announced order, row by row.

    The format allows no padding between tensors; if a reader should find them aligned, announce wider dtypes first.
    As a context manager it closes the file, or removes it after an error.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Replace the file at `path` by the header of `tensors` (name, dtype, shape); metadata None means format `pt`.

        Raises:
            CheckpointError: a name is given twice, a dtype has no code in the format, or the file cannot be written.
            ResourceError: no space is left.
        """
        self.path = Path(path)
        self._tensors = list(tensors)
        self._next = 0
        self._rows = 0
        header = _header(self.path, self._tensors, {"format": "pt"} if metadata is None else metadata)
        try:
            self._stream = self.path.open("wb", buffering=0)
        except OSError as error:
            raise _failure(self.path, error) from error
        self._writeback = Writeback(self._stream.fileno())
        self._write(memoryview(header))

    def append(self, tensor: torch.Tensor) -> None:
        """Write the next rows of axis 0 of the current tensor, `[rows, ...]`; after its last row comes the next tensor.

        Raises:
            CheckpointError: the dtype, the shape or the number of rows is not as announced, or all is written already.
            ResourceError: no space is left.
        """
        if self._next == len(self._tensors):
            raise CheckpointError(f"{self.path}: all {len(self._tensors)} announced tensors are written already")
        name, dtype, shape = self._tensors[self._next]
        rows = tensor.shape[0] if tensor.dim() else 1
        total = shape[0] if shape else 1
        fits = tensor.dim() == len(shape) and tensor.shape[1:] == torch.Size(shape[1:]) and self._rows + rows <= total
        if tensor.dtype != dtype or not fits:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} was announced as {dtype} {list(shape)} and has {self._rows} rows so "
                f"far: {tensor.dtype} {list(tensor.shape)} does not continue it"
            )
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._write(memoryview(flat.view(torch.uint8).numpy()))
        self._rows += rows
        if self._rows == total:
            self._next, self._rows = self._next + 1, 0

    def close(self) -> None:
        """Check that every tensor was written, and wait until the storage holds the file.

        Raises:
            CheckpointError: not all announced tensors were written.
            ResourceError: no space is left.
        """
        if self._stream.closed:
            return
        with self._stream:
            if self._next < len(self._tensors):
                name, _, shape = self._tensors[self._next]
                raise CheckpointError(
                    f"{self.path} is not complete: {self._rows} rows of tensor {name!r} {list(shape)} were written, "
                    f"and {len(self._tensors) - self._next - 1} tensors after it are missing"
                )
            try:
                os.fsync(self._stream.fileno())
            except OSError as error:
                raise _failure(self.path, error) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self.close()
                whole = True
        finally:
            if not whole:
                self._stream.close()
                self.path.unlink(missing_ok=True)

    def _write(self, content: memoryview) -> None:
        """Write all of `content`; one call of the system may write less of it (2 GiB on Linux)."""
        try:
            while content:
                count = self._stream.write(content)
                self._writeback.wrote(count)
                content = content[count:]
        except OSError as error:
            self._stream.close()
            raise _failure(self.path, error) from error


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a directory's files so that it is there as a whole or not at all, also after a crash.

    Args:
        directory: where the files are.
        weight_map: name of the file of each tensor.
        total_size: bytes of all tensors.

    Raises:
        CheckpointError: the file cannot be written.
        ResourceError: no space is left.
    """
    path = Path(directory) / INDEX_NAME
    partial = path.with_name(f".{INDEX_NAME}.partial")
    body = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise _failure(path, error) from error


def _header(
    path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Length and JSON of the header, padded with spaces as by the library: the tensors begin at a multiple of 8."""
    entries: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        if name in entries or name == METADATA:
            raise CheckpointError(f"{path}: tensor {name!r} was announced twice, or has a name the format keeps")
        if dtype not in _CODES:
            raise CheckpointError(f"{path}: tensor {name!r} has {dtype}, which is not written: {', '.join(DTYPES)} are")
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _failure(path: Path, error: OSError) -> LladaError:
    if error.errno in _NO_SPACE:
        return ResourceError(f"no space left to write {path} ({error.strerror}): free some, or choose another disk")
    return CheckpointError(f"{path} cannot be written ({error.strerror})")
