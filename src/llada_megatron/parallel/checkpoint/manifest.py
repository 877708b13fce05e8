"""What a checkpoint directory says of itself: `manifest.json`, read and verified without torch.

A directory `step-00000123/` counts as a checkpoint when its manifest can be read and every file has the size and
SHA-256 that the manifest states. The manifest is written last, so a directory without one was never complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import CheckpointError

SCHEMA = 1
FILE_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_MAX_DIFFERENCES = 12
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "run": dict,
    "layout": dict,
    "objective": dict,
    "recovery": dict,
    "validation": dict,
    "versions": dict,
    "tokenizer": (dict, type(None)),
    "step": int,
    "consumed_samples": int,
}
"""Facts and their types in JSON, where they are there."""
_BLOCK = 2**20


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is incomplete or whose bytes changed; an older one may still be good."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds."""

    metadata: dict[str, Any]
    """What is known of the run: model, run, step, layout and so on. JSON values, under the key `facts` in the file."""
    files: dict[str, FileRecord]
    """By name; without the manifest itself."""


def step_name(step: int) -> str:
    """Directory name of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def steps(root: Path) -> list[tuple[int, Path]]:
    """Step and path of the directories under `root` that are named as a checkpoint, newest first; none is verified."""
    if not root.is_dir():
        return []
    named = ((_STEP_NAME.fullmatch(entry.name), entry) for entry in root.iterdir())
    return sorted(((int(match[1]), entry) for match, entry in named if match and entry.is_dir()), reverse=True)


def record(path: Path, advance: Callable[[int], object] = lambda count: None) -> FileRecord:
    """Size and SHA-256 of the file at `path`, from reading it now; `advance` is called with the bytes of each read."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
            advance(count)
    return FileRecord(size, digest.hexdigest())


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` and wait until the storage holds it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the storage holds the directory's entries (names, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` durably, with a digest of its own content."""
    files = {name: asdict(manifest.files[name]) for name in sorted(manifest.files)}
    body = {"schema": SCHEMA, "facts": manifest.metadata, "files": files}
    text = json.dumps({**body, "sha256": _self_digest(body)}, indent=1)
    write_durably(directory / FILE_NAME, text.encode())


def read(directory: Path) -> Manifest:
    """Read and check `manifest.json` itself (not the files it names; see `verify_sizes`).

    Raises:
        DamagedCheckpointError: no directory or manifest, or not the text that was written.
        CheckpointError: a newer schema, or file names that leave the directory.
    """
    path = directory / FILE_NAME
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint at {directory}")
    try:
        body = json.loads(path.read_bytes())
        schema, metadata, files = body["schema"], body["facts"], body["files"]
        stated = body.pop("sha256", None)
        is_whole = stated == _self_digest(body)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"{directory} has no {FILE_NAME}: the save or the copy was not completed, or another program wrote it; "
            "copy it again as a whole, or use an older checkpoint"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r}, this program reads {SCHEMA}: use the version that wrote it"
        )
    if not is_whole:
        raise DamagedCheckpointError(f"{path} was changed after it was written")
    if (fault := _fault(metadata, files)) is not None:
        raise DamagedCheckpointError(f"{path}: {fault}; no version of this program wrote that")
    return Manifest(metadata, dict(_records(path, files)))


def _fault(metadata: Any, files: Any) -> str | None:
    """What is of a wrong type in a manifest, whatever its digest says; None where nothing is."""
    if not isinstance(metadata, dict) or not isinstance(files, dict):
        return "its facts and files are no tables"
    for name, kinds in _KINDS.items():
        value = metadata.get(name)
        if name in metadata and (not isinstance(value, kinds) or isinstance(value, bool)):
            return f"its fact {name!r} cannot be {str(value)[:40]!r}"
    counts = [metadata.get(name, 0) for name in ("step", "consumed_samples")]
    if not all(0 <= count < 2**63 for count in counts):
        return "its step or number of samples is no count"
    return None


def verify_sizes(directory: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there with its size, and that nothing else is.

    Raises:
        DamagedCheckpointError: naming the file and what is wrong with it.
    """
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
    for name, stated in manifest.files.items():
        if name not in sizes:
            raise DamagedCheckpointError(f"{directory / name} is missing")
        if sizes[name] != stated.size:
            raise DamagedCheckpointError(f"{directory / name} has {sizes[name]:,} bytes instead of {stated.size:,}")
    known = {*manifest.files, FILE_NAME}
    extra = sorted(name for name in sizes if name not in known and not name.startswith(".nfs"))
    if extra:
        raise DamagedCheckpointError(f"{directory / extra[0]} is not in {FILE_NAME}: it was added after the save")


def verify_digest(
    directory: Path, name: str, stated: FileRecord, advance: Callable[[int], object] = lambda count: None
) -> str | None:
    """Read the whole of one file, and return what is wrong with it, or None. `advance` is called as by `record`."""
    try:
        found = record(directory / name, advance)
    except OSError as error:
        return f"{directory / name} cannot be read ({error.strerror})"
    if found.size != stated.size:
        return f"{directory / name} has {found.size:,} bytes instead of {stated.size:,}"
    if found.sha256 != stated.sha256:
        return f"{directory / name} does not hold the bytes that were written (SHA-256 differs)"
    return None


def require_model(path: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        CheckpointError: listing each differing key with the checkpoint's and the run's value.
    """
    found = dict(_leaves(metadata.get("model") or {}))
    wanted = dict(_leaves(json.loads(json.dumps(expected))))
    pairs = {key: (found.get(key, "absent"), wanted.get(key, "absent")) for key in sorted(found.keys() | wanted.keys())}
    differing = [f"{key}: {a} in the checkpoint, {b} in this run" for key, (a, b) in pairs.items() if a != b]
    if not differing:
        return
    rest = f" (and {len(differing) - _MAX_DIFFERENCES} more)" if len(differing) > _MAX_DIFFERENCES else ""
    raise CheckpointError(
        f"{path} holds another model: {'; '.join(differing[:_MAX_DIFFERENCES])}{rest}. Use its model configuration, or "
        "another directory"
    )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; a list is one value, an empty mapping or None is absent."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif tree is not None:
        yield prefix, tree


def _records(path: Path, files: dict[str, Any]) -> Iterator[tuple[str, FileRecord]]:
    for name, stated in files.items():
        if name in ("", ".", "..", FILE_NAME) or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} names {name!r}, which is not a file of the checkpoint: refused")
        match stated:
            case {"size": int(size), "sha256": str(digest)} if size >= 0 and _DIGEST.fullmatch(digest):
                yield name, FileRecord(size, digest)
            case _:
                raise DamagedCheckpointError(f"{path}: its file {name[:40]!r} has no size and SHA-256")


def _self_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
