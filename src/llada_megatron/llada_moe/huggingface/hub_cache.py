"""Directories of the Hugging Face hub's cache, and the refusal of links that lead out of a directory.

Layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): `models--ORG--NAME/snapshots/HASH/FILE` is a
link to `../../blobs/DIGEST`.
"""

from __future__ import annotations

from pathlib import Path

from llada_megatron.llada_moe.errors import LladaError

_PREFIX, _SNAPSHOTS, _BLOBS = "models--", "snapshots", "blobs"


def repository_name(directory: Path) -> str:
    """`ORG/NAME` of a snapshot in the cache, or the name of a directory that is not in the cache."""
    directory = directory.resolve()
    repository = directory.parent.parent.name
    if directory.parent.name == _SNAPSHOTS and repository.startswith(_PREFIX):
        return repository.removeprefix(_PREFIX).replace("--", "/")
    return directory.name


def require_own_file(path: Path, error: type[LladaError]) -> None:
    """Check that a file is in its directory or, in the hub's cache, among the blobs of the same repository.

    Raises:
        error: it is a link to somewhere else. The file there could be a secret, and would be converted and published.
    """
    try:
        directory, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as reason:  # a loop of links is a RuntimeError before Python 3.13
        raise error(f"{path} cannot be read ({reason}): download or copy it again") from None
    homes = [directory]
    if directory.parent.name == _SNAPSHOTS:
        homes.append(directory.parent.parent / _BLOBS)  # not resolved: a link of that name leads out as well
    if not any(target.is_relative_to(home) for home in homes):
        raise error(
            f"{path} is a link to {target}, outside of its directory: refused, because what is there would be "
            "converted or copied; if it belongs to the checkpoint, put the file itself in the place of the link"
        )
