"""The header of a .safetensors file, parsed here because the library does not tell where in the file a tensor lies.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors' bytes without gaps.

The position is what the reader needs to read rows without mapping the file (safetensors_reader.py). The header of a
downloaded file is checked here before anything trusts it, and a fault is named with the tensor that has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
METADATA = "__metadata__"
MAX_JSON_BYTES = 100_000_000  # the library's own limit for a header
AGAIN = "download or copy it again"
_PREFIX_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_MAX_TENSOR_BYTES = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: what it is and where it lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Where its bytes begin, counted from the start of the file."""
    size: int
    """Number of its bytes."""

    @property
    def rows(self) -> int:
        """Length of axis 0; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one .safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, a dtype is unknown, tensors overlap or leave gaps.
    """
    text, start, end = _header_text(path)
    header = parse_json(path, text, "header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} of the header is not a table of strings: {AGAIN}")
    tensors = [_tensor(path, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    _check_contiguous(path, tensors, start, end)
    return tensors


def parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        CheckpointError: it is not one, or has a name twice; the message calls the text `what`.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_object_of_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is not valid JSON ({error}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: the {what} is not a JSON object: {AGAIN}")
    return content


def file_size(path: Path) -> int:
    """Size in bytes of a regular file, with links followed. Raises CheckpointError: there is none."""
    try:
        if path.is_file():
            return path.stat().st_size
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, where no file is: {AGAIN}")
        reason = "is not a regular file" if path.exists() else "is missing"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise CheckpointError(f"{path} {reason}: {AGAIN}")


def _header_text(path: Path) -> tuple[bytes, int, int]:
    """The header's JSON, and the file offsets at which the tensors' bytes start and the file ends."""
    size = file_size(path)
    try:
        with path.open("rb") as stream:
            prefix = stream.read(_PREFIX_BYTES)
            length = int.from_bytes(prefix, "little")
            if size > _PREFIX_BYTES and _LFS_POINTER.startswith(prefix):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
            if len(prefix) < _PREFIX_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: {AGAIN}")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path} states a header of {length:,} bytes, more than the {MAX_JSON_BYTES:,} of the format: "
                    f"not a safetensors file, or damaged; {AGAIN}"
                )
            if _PREFIX_BYTES + length > size:
                raise CheckpointError(
                    f"{path} is truncated: it states a header of {length:,} bytes, {size - _PREFIX_BYTES:,} are there; "
                    f"{AGAIN}"
                )
            return stream.read(length), _PREFIX_BYTES + length, size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _object_of_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError: a name is there twice; `json` alone would keep the last value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return content


def _tensor(path: Path, start: int, name: str, entry: Any) -> TensorInfo:
    """Check one entry of the header by itself, and return the tensor that it describes."""
    where = f"{path}: tensor {name!r}"
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise CheckpointError(f"{where} lacks a well-formed dtype, shape or data_offsets in the header: {AGAIN}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{where} has a shape or offsets that are not whole numbers from 0: {AGAIN}")
    if code not in DTYPES:
        raise CheckpointError(
            f"{where} has dtype {code!r}, which is not read here (known: {', '.join(DTYPES)}): save it as BF16 or F32"
        )
    dtype = DTYPES[code]
    size = math.prod(shape) * dtype.itemsize
    if math.prod(length or 1 for length in shape) * dtype.itemsize > _MAX_TENSOR_BYTES:
        raise CheckpointError(f"{where} of shape {shape} is larger than any memory: the header is damaged; {AGAIN}")
    if size != end - begin:
        raise CheckpointError(
            f"{where} of dtype {code} and shape {shape} takes {size:,} bytes, its offsets [{begin}, {end}] state "
            f"{end - begin:,}: the header is damaged; {AGAIN}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, size)


def _check_contiguous(path: Path, tensors: list[TensorInfo], start: int, end: int) -> None:
    """Check that every byte from `start` to `end` belongs to exactly one tensor."""
    for found, wanted in zip(tensors, _ends(tensors, start), strict=False):
        if found.offset != wanted:
            fault = "overlaps the tensor before it" if found.offset < wanted else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {found.name!r} {fault} (it starts at byte {found.offset:,} of the file, the one "
                f"before ends at {wanted:,}): the header is damaged; {AGAIN}"
            )
    last = tensors[-1] if tensors else None
    stated = last.offset + last.size if last else start
    if stated > end:
        cut = next(tensor for tensor in tensors if tensor.offset + tensor.size > end)
        raise CheckpointError(
            f"{path} is truncated: its header states {stated:,} bytes, {end:,} are there, and tensor {cut.name!r} is "
            f"cut off; {AGAIN}"
        )
    if stated < end:
        raise CheckpointError(f"{path} has {end:,} bytes, {end - stated:,} more than its tensors take: {AGAIN}")


def _ends(tensors: list[TensorInfo], start: int) -> Iterator[int]:
    """Where each tensor has to begin: the first at `start`, each other where the one before ends."""
    yield start
    for tensor in tensors:
        yield tensor.offset + tensor.size
