"""Reads rows of .safetensors files without mapping them, as the library does: a map counts as memory, and can crash.

`safetensors.safe_open(…).get_slice` maps the whole file. Of safetensors 0.8.0 was measured that slices of 16 MB of a
256 MB file leave all 256 MB resident, which a limit on memory counts, and that the process ends with SIGBUS if the file
is cut meanwhile; here that is a CheckpointError, and only the rows that are read take memory.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

import torch

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.safetensors_header import (
    AGAIN,
    MAX_JSON_BYTES,
    TensorInfo,
    file_size,
    parse_json,
    read_header,
)
from llada_megatron.llada_moe.storage import read_into

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorDirectory:
    """The tensors of a directory: of the files that its index names, of `model.safetensors`, or of its only such file.

    All headers are read and checked when it is opened, the weights are not. Several threads may call `read` at a time.
    """

    tensors: dict[str, TensorInfo]
    """By name, in the order of their bytes: files by name, then by offset."""
    files: list[Path]
    bytes: int
    """Sum of the sizes of all tensors."""

    def __init__(self, directory: Path) -> None:
        """Find the files and read their headers.

        Raises:
            CheckpointError: there are no weights or only pickles, a file is missing or damaged, or the index does not
                fit the files.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory: give the one that holds the {SUFFIX} files")
        weight_map = _read_index(self.directory)
        self.files = _single_file(self.directory) if weight_map is None else _shards(self.directory, weight_map)
        self.tensors = {}
        for path in self.files:
            for tensor in read_header(path):
                other = self.tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(
                        f"tensor {tensor.name!r} is in {other.file} and in {path}, which counts is not said; {AGAIN}"
                    )
        if weight_map is not None:
            _check_index(self.directory, weight_map, self.tensors)
        self.bytes = sum(tensor.size for tensor in self.tensors.values())
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of axis 0 of a tensor, `[stop - start, ...]`, in their own memory; a scalar has one row.

        Raises:
            CheckpointError: there is no such tensor, or its file was cut or removed since the directory was opened.
            IndexError: the rows are outside the tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        stop = info.rows if stop is None else stop
        if not 0 <= start <= stop <= info.rows or (not info.shape and start == stop):
            raise IndexError(f"rows [{start}, {stop}) of {name!r}, which has {info.rows}")
        result = torch.empty((stop - start, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        if result.numel() == 0:
            return result
        offset, descriptor = info.offset + start * (info.size // info.rows), self._descriptor(info)
        try:
            done = read_into(descriptor, offset, result)
        except OSError as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read ({error.strerror})") from error
        if done < result.nbytes:
            raise CheckpointError(
                f"{info.file} was truncated while in use: it ends at byte {offset + done:,}, tensor {name!r} "
                f"reaches to {info.offset + info.size:,}; {AGAIN}"
            )
        return result

    def close(self) -> None:
        """Close the files; a later `read` opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> TensorDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, info: TensorInfo) -> int:
        with self._lock:
            if info.file not in self._descriptors:
                try:
                    self._descriptors[info.file] = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(
                        f"{info.file} cannot be opened ({error.strerror}) to read tensor {info.name!r}"
                    ) from error
            return self._descriptors[info.file]


def _read_index(directory: Path) -> dict[str, str] | None:
    """{tensor: file name} of the index, or None without one; no name is that of a file outside the directory."""
    path = directory / INDEX_NAME
    if not os.path.lexists(path):
        return None
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, more than {MAX_JSON_BYTES:,}: not an index; {AGAIN}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    weight_map = parse_json(path, text, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, the table of tensors and their files: {AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.isprintable() or {"/", "\\"} & set(name) or name in ("", ".", ".."):
            raise CheckpointError(
                f"{path} says that tensor {tensor!r} is in {name!r}, which is not a file of this directory: refused; "
                "get the checkpoint from a source you trust"
            )
        if not name.endswith(SUFFIX):
            raise CheckpointError(
                f"{path} says that tensor {tensor!r} is in {name!r}: only {SUFFIX} files are read; {_how_to_convert()}"
            )
    return weight_map


def _shards(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files of an index, which are checked to be there."""
    tensors = defaultdict(list)
    for tensor, name in weight_map.items():
        tensors[name].append(tensor)
    if SINGLE_NAME not in tensors and os.path.lexists(directory / SINGLE_NAME):
        raise CheckpointError(
            f"{directory} holds {SINGLE_NAME} and {INDEX_NAME}, which does not name it: remove the set of weights that "
            "is not meant"
        )
    for name, held in sorted(tensors.items()):
        try:
            file_size(directory / name)
        except CheckpointError as error:
            others = f" and {len(held) - 1} more" if len(held) > 1 else ""
            raise CheckpointError(f"{error} (by {INDEX_NAME} it holds tensor {held[0]!r}{others})") from error
    return [directory / name for name in sorted(tensors)]


def _check_index(directory: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Check that the index names exactly the tensors of its files, each in the file that holds it."""
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file.name != file:
            elsewhere = f"; {found.file.name} holds it" if found else ""
            raise CheckpointError(
                f"{directory / INDEX_NAME} says that tensor {name!r} is in {file}, which does not hold it{elsewhere}: "
                f"the index is of other files; {AGAIN}"
            )
    extra = next((tensor for name, tensor in tensors.items() if name not in weight_map), None)
    if extra:
        raise CheckpointError(
            f"{extra.file} holds tensor {extra.name!r}, which {INDEX_NAME} does not name: the index is of other files; "
            f"{AGAIN}"
        )


def _single_file(directory: Path) -> list[Path]:
    """`model.safetensors`, or else the only .safetensors file of a directory without an index."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed ({error.strerror})") from error
    found = [name for name in names if name.endswith(SUFFIX)]
    if SINGLE_NAME in found:
        found = [SINGLE_NAME]
    if len(found) == 1:
        return [directory / found[0]]
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} {SUFFIX} files ({found[0]} … {found[-1]}) and no {INDEX_NAME} to say "
            "which tensors belong to the model: download or copy the index too"
        )
    if found := pickles(directory):
        raise CheckpointError(
            f"{directory} holds only pickles ({found[0]}), which can run code when they are loaded and are not read "
            f"here: {_how_to_convert()}"
        )
    raise CheckpointError(f"{directory} holds no weights: no {INDEX_NAME} and no {SUFFIX} file; {AGAIN}")


def pickles(directory: Path) -> list[str]:
    """Names of the files of a directory that may hold pickled weights."""
    return sorted(path.name for path in directory.glob("*") if path.name.endswith(_PICKLE_SUFFIXES))


def _how_to_convert() -> str:
    return (
        "on a machine you trust, load the checkpoint with transformers' from_pretrained and write it with "
        "save_pretrained, which writes safetensors"
    )
