"""SHA-256 of the files of a prepared set, piece by piece: several threads, or several ranks, check it together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llada_megatron.llada_moe.data.set_manifest import SetManifest, prefix_file
from llada_megatron.llada_moe.errors import DataError

PIECE = 64 << 20
"""Bytes that one digest stands for; the last piece of a file is shorter. Part of the format."""

_STEP = 4 << 20
"""Bytes read at a time."""

_THREADS = 8


def digests_of(prefix: Path, endings: Iterable[str]) -> dict[str, list[str]]:
    """The digests of the pieces of each file of a set, in hexadecimal, by the file's ending."""
    files = {ending: prefix_file(prefix, ending) for ending in endings}
    pieces = [(path, number) for path in files.values() for number in range(_pieces(path))]
    found = dict(zip(pieces, _digest_all(pieces), strict=True))
    return {ending: [found[path, number] for number in range(_pieces(path))] for ending, path in files.items()}


def check_digests(prefix: str | Path, manifest: SetManifest, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a set with the digests of its manifest, if it has any.

    Args:
        part: which of `parts` equal shares of the pieces is read here; together they are the whole set.

    Raises:
        DataError: names the file that is not as it was prepared, and where.
    """
    pieces: list[tuple[Path, int]] = []
    expected: list[str] = []
    for ending, digests in (manifest.digests or {}).items():
        path = prefix_file(prefix, ending)
        if _pieces(path) != len(digests):
            raise _damaged(path, f"{path.stat().st_size:,} bytes are not the length that it had")
        pieces += [(path, number) for number in range(len(digests))]
        expected += digests
    pieces, expected = pieces[part::parts], expected[part::parts]
    for (path, number), found, known in zip(pieces, _digest_all(pieces), expected, strict=True):
        if found != known:
            end = min((number + 1) * PIECE, path.stat().st_size)
            raise _damaged(path, f"bytes {number * PIECE:,} to {end:,} are not those that were prepared")


def size_of(prefix: str | Path, manifest: SetManifest) -> int:
    """Bytes of all files that have digests."""
    return sum(prefix_file(prefix, ending).stat().st_size for ending in manifest.digests or {})


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged or replaced: {what}; restore the file, or prepare the set again")


def _pieces(path: Path) -> int:
    try:
        return -(-path.stat().st_size // PIECE)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; restore the file, or prepare the set again") from error


def _digest_all(pieces: list[tuple[Path, int]]) -> list[str]:
    """The digests of pieces, each a file and a number in it."""
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing gives way to other threads
        return list(pool.map(lambda piece: _digest(*piece), pieces))


def _digest(path: Path, number: int) -> str:
    digest, at, end = hashlib.sha256(), number * PIECE, (number + 1) * PIECE
    with path.open("rb") as file:
        while at < end and (data := os.pread(file.fileno(), min(_STEP, end - at), at)):
            digest.update(data)
            at += len(data)
    return digest.hexdigest()
