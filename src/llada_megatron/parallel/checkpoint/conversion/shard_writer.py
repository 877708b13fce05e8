"""A checkpoint written piece by piece: by tasks in any order, in threads, and in another process after a kill.

A task writes one file `__{rank}_{task}.distcp` for every rank that it has data for. Its record, which can be kept as
JSON, says what they hold; `finalize` makes a checkpoint of the records. The same pieces give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.storage import Writeback
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from llada_megatron.parallel.checkpoint.conversion.placement import Box, tiling_fault
from llada_megatron.parallel.checkpoint.manifest import FileRecord, Manifest

_PICKLE_PROTOCOL = 4  # Python's default has changed; the bytes must not


class TaskWriter:
    """The files of one task. For one thread, which ends with `close` or `discard`."""

    def __init__(self, directory: Path, task: int) -> None:
        """Nothing is written before the first piece.

        Args:
            directory: of the checkpoint; exists.
            task: its number. Doing a task again replaces its files.
        """
        self._directory, self._task = directory, task
        self._files: dict[int, _HashedFile] = {}
        self._entries: list[dict[str, Any]] = []

    def append(
        self, rank: int, key: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], tensor: torch.Tensor
    ) -> None:
        """Write one part of the weight `key` into the file of `rank`.

        Args:
            global_shape: of the whole weight.
            offsets: where the part begins on each axis.
            tensor: the part; leading axes of length one may be missing. May be a view of something larger.

        Raises:
            OSError: it cannot be written.
        """
        sizes = (1,) * (len(global_shape) - tensor.dim()) + tuple(tensor.shape)
        file = self._files.get(rank)
        if file is None:
            path = self._directory / f"__{rank}_{self._task}.distcp"
            file = self._files[rank] = _HashedFile(path)
        begin = file.size
        try:
            torch.save(_alone(tensor.detach()).view(sizes), file)
        except RuntimeError as error:  # torch puts one of its own before that of a failed write
            raise file.failure or error from error
        self._entries.append(
            {
                "key": key,
                "shape": list(global_shape),
                "offsets": list(offsets),
                "sizes": list(sizes),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "file": file.path.name,
                "offset": begin,
                "length": file.size - begin,
            }
        )

    def close(self) -> dict[str, Any]:
        """Wait until the storage holds the files; the task's record (JSON values)."""
        files = {file.path.name: file.finish() for _, file in sorted(self._files.items())}
        self._files = {}
        manifests.sync_directory(self._directory)
        return {"task": self._task, "files": files, "entries": self._entries}

    def discard(self) -> None:
        """Remove what was not closed; after `close` this does nothing."""
        for file in self._files.values():
            file.remove()
        self._files = {}


def finalize(directory: Path, records: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Make a checkpoint of what the tasks wrote; the manifest comes last.

    Args:
        directory: as given to the tasks; any of its name, and the caller's to rename.
        records: of all tasks, in any order.
        facts: what the manifest says of the checkpoint (JSON values); see `RunState` for those of a run.

    Raises:
        CheckpointError: the parts do not fill every weight exactly once, or a file is not as its record says.
    """
    entries, files = _joined(records)
    description = _describe(directory, entries)
    manifests.write_durably(directory / safety.METADATA, pickle.dumps(description, protocol=_PICKLE_PROTOCOL))
    common = io.BytesIO()
    torch.save({}, common)
    manifests.write_durably(directory / safety.COMMON, common.getvalue())
    manifests.write_durably(directory / safety.CONFIG, safety.CONFIG_CONTENT)
    files |= {name: manifests.record(directory / name) for name in (safety.METADATA, safety.COMMON, safety.CONFIG)}
    manifest = Manifest(dict(facts), files)
    manifests.verify_sizes(directory, manifest)
    manifests.write(directory, manifest)
    manifests.sync_directory(directory)


@dataclass(frozen=True, order=True)
class _Part:
    """Where one part of a weight is."""

    key: str
    box: Box
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int


def _joined(records: Iterable[Mapping[str, Any]]) -> tuple[list[_Part], dict[str, FileRecord]]:
    """All parts in order of key and place, and the files of all records."""
    parts, files = [], {}
    for record in records:
        for name, entry in record["files"].items():
            if name in files:
                raise CheckpointError(f"two tasks wrote {name}: give every task a number of its own")
            files[name] = FileRecord(entry["size"], entry["sha256"])
        for entry in record["entries"]:
            place = (sys.intern(entry["file"]), entry["offset"], entry["length"])
            box = Box(tuple(entry["offsets"]), tuple(entry["sizes"]))
            parts.append(_Part(sys.intern(entry["key"]), box, tuple(entry["shape"]), entry["dtype"], *place))
    return sorted(parts), files


def _describe(directory: Path, parts: list[_Part]) -> metadata.Metadata:
    """torch's description of the parts. Equal strings are one object each, since a pickle tells them from copies."""
    by_key: dict[str, list[_Part]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    tensors, places = {}, {}
    for key, mine in by_key.items():
        shape, dtype = mine[0].shape, mine[0].dtype
        fault = tiling_fault(shape, [part.box for part in mine])
        if any((part.shape, part.dtype) != (shape, dtype) for part in mine):
            fault = "has parts of different dtypes or global shapes"
        if fault:
            raise CheckpointError(f"{directory}: the weight {key!r} {fault}; convert anew")
        chunks = [metadata.ChunkStorageMetadata(*map(torch.Size, part.box)) for part in mine]
        properties = metadata.TensorProperties(dtype=getattr(torch, dtype))
        tensors[key] = metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for number, part in enumerate(mine):
            index = metadata.MetadataIndex(key, part.box.offsets, number)
            places[index] = filesystem._StorageInfo(part.file, part.offset, part.length)
    return metadata.Metadata(tensors, storage_data=places, storage_meta=metadata.StorageMeta())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its storage holds anything else: torch.save writes whole storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _HashedFile:
    """A file whose SHA-256 is taken while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._stream, self._digest = path.open("wb"), hashlib.sha256()
        self._writeback = Writeback(self._stream.fileno())
        self.failure: OSError | None = None
        """With the file's name."""

    def write(self, content: Any) -> int:
        self._digest.update(content)
        with self._named():
            self._stream.write(content)
        count = memoryview(content).nbytes
        self._writeback.wrote(count)
        self.size += count
        return count

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def finish(self) -> dict[str, Any]:
        """Wait until the storage holds the file; its size and digest."""
        with self._named():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Give an error of the system the file's name, and keep it."""
        try:
            yield
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(self.path))
            raise self.failure from error

    def remove(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is reported by the write that met it
            self._stream.close()
        self.path.unlink(missing_ok=True)
