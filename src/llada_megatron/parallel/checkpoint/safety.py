"""Safe reading of a checkpoint: nothing that is in it is run.

A `torch_dist` directory is made of pickles, and two of its readers run whatever a pickle asks for: torch reads
`.metadata` with plain `pickle.load` (torch/distributed/checkpoint/filesystem.py, FileSystemReader.read_metadata) and
the objects inside `*.distcp` with `torch.load(weights_only=False)` (default_planner.py,
DefaultLoadPlanner.load_bytes). A manifest does not help: whoever changes a file can also write its new hash. So:

* `.metadata` is only ever read by an unpickler that knows the handful of classes such a file is made of; the same
  reading is put in place of torch's while Megatron loads, so that what was checked is what is used;
* objects are only ever read with `weights_only`: every one of them is tried before anything is loaded, and
  TORCH_FORCE_WEIGHTS_ONLY_LOAD, which overrides an explicit `weights_only=False` (torch/serialization.py, load), is
  set while Megatron loads;
* every file that is read is one of the manifest, and no other storage format or client is reachable.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from llada_megatron.llada_moe.errors import CheckpointError

METADATA = ".metadata"
CONFIG = "metadata.json"
CONFIG_CONTENT = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
COMMON = "common.pt"
_CONFIG_VALUES = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CLASSES = (
    torch.Size,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
    pathlib.PosixPath,
)
_ADVICE = "It was refused and nothing in it was run. Load only checkpoints whose origin you know"


def _layout(name: str) -> torch.layout:
    """Takes the place of torch.serialization._get_layout."""
    return {"torch.strided": torch.strided}[name]


_ALLOWED: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES}
_ALLOWED[("torch.serialization", "_get_layout")] = _layout
_ALLOWED[("pathlib._local", "PosixPath")] = pathlib.PosixPath  # its module since Python 3.13
_ALLOWED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes that `.metadata` is made of, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_metadata(directory: Path, files: Collection[str]) -> metadata.Metadata:
    """The parsed `.metadata` of `directory`, checked to refer to none but `files`.

    Raises:
        CheckpointError: it holds anything but a description of tensors and objects in those files.
    """
    path = directory / METADATA
    attributes = {cls: dict(vars(cls)) for cls in _CLASSES}
    try:
        with path.open("rb") as stream:
            found = _MetadataUnpickler(stream).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path} is not a description of tensors ({error}). {_ADVICE}") from None
    # pickle's BUILD can set attributes of a class; no allowed value makes that a way to run code, but nobody needs it
    if any(dict(vars(cls)) != before for cls, before in attributes.items()):
        raise CheckpointError(f"{path} tries to change a class. {_ADVICE}")
    fault = _structure_fault(found, files)
    if fault:
        raise CheckpointError(f"{path} {fault}. {_ADVICE}")
    return found


def _structure_fault(found: Any, files: Collection[str]) -> str | None:
    if not isinstance(found, metadata.Metadata) or not isinstance(found.state_dict_metadata, dict):
        return "does not describe a checkpoint"
    known = (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata)
    if any(type(key) is not str or type(value) not in known for key, value in found.state_dict_metadata.items()):
        return "describes something that is neither a tensor nor an object"
    if not isinstance(found.storage_data, dict):
        return "does not say where its tensors are"
    for index, place in found.storage_data.items():
        if type(index) is not metadata.MetadataIndex or type(place) is not filesystem._StorageInfo:
            return "has a storage entry of an unknown kind"
        if type(place.relative_path) is not str or place.relative_path not in files:
            return f"refers to {place.relative_path!r}, which is not a file of the checkpoint"
        if type(place.offset) is not int or type(place.length) is not int or min(place.offset, place.length) < 0:
            return f"has an impossible position for {index.fqn!r}"
        if getattr(place, "transform_descriptors", None):
            return f"asks for a transformation of {index.fqn!r}"
    return None


def refuse_unsafe(directory: Path, files: Collection[str], part: int = 0, parts: int = 1) -> None:
    """Read share `part` of `parts` of the checkpoint's objects with a reader that runs nothing.

    Raises:
        CheckpointError: naming the file and object that is more than plain data.
    """
    _check_config(directory / CONFIG)
    found = read_metadata(directory, files)
    if part == 0 and COMMON in files:
        _check_object(directory / COMMON, None, 0, -1)
    objects = sorted(index.fqn for index in found.storage_data if not _is_tensor(found, index.fqn))
    mine = set(objects[part::parts])
    for index, place in found.storage_data.items():
        if index.fqn in mine:
            _check_object(directory / place.relative_path, index.fqn, place.offset, place.length)


def _is_tensor(found: metadata.Metadata, key: str) -> bool:
    return isinstance(found.state_dict_metadata.get(key), metadata.TensorStorageMetadata)


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_bytes())
        odd = [key for key in config if config[key] != _CONFIG_VALUES.get(key)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if odd:
        raise CheckpointError(f"{path} asks for {odd[0]} = {config[odd[0]]!r}; only torch_dist checkpoints are read")


def _check_object(path: Path, key: str | None, offset: int, length: int) -> None:
    with path.open("rb") as stream:
        stream.seek(offset)
        content = io.BytesIO(stream.read(length))
    try:
        torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        what = f"object {key!r} in {path}" if key else str(path)
        raise CheckpointError(f"{what} is more than plain data ({_cause(error)}). {_ADVICE}") from None


def _cause(error: Exception) -> str:
    """The one line of torch's long message that names the cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return next((line for line in lines if "GLOBAL" in line or "nsupported" in line), first)[:300]


@contextlib.contextmanager
def guarded(directory: Path, files: Collection[str]) -> Iterator[None]:
    """Inside the `with` block the readers of torch and Megatron run nothing of `directory`, and read nothing else."""

    def read(self: Any, *_: Any, **__: Any) -> metadata.Metadata:
        if Path(self.path) != directory:
            raise CheckpointError(f"{self.path} is read while {directory} is loaded")
        found = read_metadata(directory, files)
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    reader = filesystem.FileSystemReader
    torch_read = reader.read_metadata
    with local_files(), _environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=None):
        reader.read_metadata = read
        try:
            yield
        finally:
            reader.read_metadata = torch_read


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables set (or, with None, removed) inside the `with` block."""
    before = {name: os.environ.get(name) for name in values}

    def put(settings: dict[str, str | None]) -> None:
        for name, value in settings.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def local_files() -> Iterator[None]:
    """Plain files inside the `with` block; Megatron would use the multi-storage client where that is installed."""
    from megatron.core.msc_utils import MultiStorageClientFeature  # here: reading metadata does not need Megatron

    enabled = MultiStorageClientFeature.is_enabled()
    MultiStorageClientFeature.disable()
    try:
        yield
    finally:
        if enabled:
            MultiStorageClientFeature.enable()
