"""A sharded checkpoint written by conversion tasks, which may run in any order, in threads, and again after a kill.

A task writes one file `__{rank}_{task}.distcp` for every rank that it has data for. Its record, which can be kept as
JSON, says what the files hold; `finalize` makes a checkpoint of the records. The same tensors give the same bytes.
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
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.storage import Writeback
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from llada_megatron.parallel.checkpoint.conversion.placement import Box, tiling_fault
from llada_megatron.parallel.checkpoint.manifest import FileRecord, Manifest

_PICKLE_PROTOCOL = 4  # Python's default has changed; the bytes must not


class TaskWriter:
    """The files of one task, written by one thread, which ends with `close` or `discard`."""

    def __init__(self, directory: Path, task: int) -> None:
        """Open no file before the first `append`.

        Args:
            directory: the checkpoint's, which exists.
            task: number of the task. Running a task again replaces its files.
        """
        self._directory, self._task = directory, task
        self._files: dict[int, _HashedFile] = {}
        self._shards: list[dict[str, Any]] = []

    def append(
        self, rank: int, key: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], tensor: torch.Tensor
    ) -> None:
        """Write one shard of the weight `key` into the file of `rank`.

        Args:
            global_shape: shape of the whole weight.
            offsets: where the shard begins on each axis of the weight.
            tensor: the shard; leading axes of length one may be missing. May be a view of a larger tensor.

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
        except RuntimeError as error:  # torch raises one of its own in place of that of a failed write
            raise file.failure or error from error
        self._shards.append(
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
        """Wait until the storage holds the files, and return the task's record (JSON values)."""
        files = {file.path.name: file.finish() for _, file in sorted(self._files.items())}
        self._files = {}
        manifests.sync_directory(self._directory)
        return {"task": self._task, "files": files, "entries": self._shards}

    def discard(self) -> None:
        """Remove the files of a task that was not closed; after `close` this does nothing."""
        for file in self._files.values():
            file.remove()
        self._files = {}


def finalize(directory: Path, records: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
    """Make a checkpoint of what the tasks wrote; the manifest is written last.

    Args:
        directory: as given to the tasks. It may have any name; the caller renames it.
        records: of all tasks, in any order.
        metadata: what the manifest says of the run (JSON values), with the keys that a training run writes.

    Raises:
        CheckpointError: the shards do not fill every weight exactly once, or a file is not as its record says.
    """
    shards, files = _joined(records)
    description = _describe(directory, shards)
    manifests.write_durably(directory / safety.METADATA, pickle.dumps(description, protocol=_PICKLE_PROTOCOL))
    common = io.BytesIO()
    torch.save({}, common)
    manifests.write_durably(directory / safety.COMMON, common.getvalue())
    manifests.write_durably(directory / safety.CONFIG, safety.CONFIG_CONTENT)
    files |= {name: manifests.record(directory / name) for name in (safety.METADATA, safety.COMMON, safety.CONFIG)}
    manifest = Manifest(dict(metadata), files)
    manifests.verify_sizes(directory, manifest)
    manifests.write(directory, manifest)
    manifests.sync_directory(directory)


@dataclass(frozen=True, order=True)
class _Shard:
    """One saved shard of a weight: where it lies in the weight, and in which file."""

    key: str
    box: Box
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int


def _joined(records: Iterable[Mapping[str, Any]]) -> tuple[list[_Shard], dict[str, FileRecord]]:
    """All shards in order of key and position, and the files of all records."""
    shards, files = [], {}
    for record in records:
        for name, stated in record["files"].items():
            if name in files:
                raise CheckpointError(f"two tasks wrote {name}: give every task a number of its own")
            files[name] = FileRecord(stated["size"], stated["sha256"])
        for saved in record["entries"]:
            place = (sys.intern(saved["file"]), saved["offset"], saved["length"])
            box = Box(tuple(saved["offsets"]), tuple(saved["sizes"]))
            shards.append(_Shard(sys.intern(saved["key"]), box, tuple(saved["shape"]), saved["dtype"], *place))
    return sorted(shards), files


def _describe(directory: Path, shards: list[_Shard]) -> torch_metadata.Metadata:
    """torch's description of the shards.

    Equal strings must be one object, because a pickle stores a copy of a string in another way than a repetition.
    """
    by_key: dict[str, list[_Shard]] = {}
    for shard in shards:
        by_key.setdefault(shard.key, []).append(shard)
    tensors, places = {}, {}
    for key, mine in by_key.items():
        shape, dtype = mine[0].shape, mine[0].dtype
        fault = tiling_fault(shape, [shard.box for shard in mine])
        if any((shard.shape, shard.dtype) != (shape, dtype) for shard in mine):
            fault = "has parts of different dtypes or global shapes"
        if fault:
            raise CheckpointError(f"{directory}: the weight {key!r} {fault}; convert anew")
        chunks = [torch_metadata.ChunkStorageMetadata(*map(torch.Size, shard.box)) for shard in mine]
        properties = torch_metadata.TensorProperties(dtype=getattr(torch, dtype))
        tensors[key] = torch_metadata.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for number, shard in enumerate(mine):
            index = torch_metadata.MetadataIndex(key, shard.box.offsets, number)
            places[index] = filesystem._StorageInfo(shard.file, shard.offset, shard.length)
    return torch_metadata.Metadata(tensors, storage_data=places, storage_meta=torch_metadata.StorageMeta())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its storage holds more than it, because torch.save writes whole storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _HashedFile:
    """A file whose SHA-256 is taken while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._stream, self._digest = path.open("wb"), hashlib.sha256()
        self._writeback = Writeback(self._stream.fileno())
        self.failure: OSError | None = None
        """The error of the last failed write, with the file's name."""

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
        """Wait until the storage holds the file, and return its size and digest."""
        with self._named():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Raise an error of the system with the file's name, and keep it in `failure`."""
        try:
            yield
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(self.path))
            raise self.failure from error

    def remove(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write that failed
            self._stream.close()
        self.path.unlink(missing_ok=True)
