"""What is checked of the prepared sets when a run starts, and said where a set cannot be checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.console import message, size_text

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.set_manifest import SetManifest

_TAKES_A_WHILE = 2 * 10**9
"""Bytes from which the wait is announced."""


def verify_data(run: RunConfig, rank: int = 0, ranks: int = 1) -> None:
    """Compare each prepared set with its digests, unless `data.verify` is `never`.

    Args:
        rank, ranks: of processes that were started together, each reads its share; rank 0 speaks.

    Raises:
        DataError: a file is damaged, or not the one that was prepared.
    """
    from llada_megatron.llada_moe.data.digests import check_digests, size_of
    from llada_megatron.llada_moe.data.set_manifest import read_manifest

    for entry in run.data.sets:
        manifest = read_manifest(entry.path)
        if rank == 0:
            _remark(run, entry.path, manifest)
        if run.data.verify == "never":
            continue
        if rank == 0 and (size := size_of(entry.path, manifest)) > _TAKES_A_WHILE:
            message(f"checking {entry.path} for damage ({size_text(size)}; data.verify=never leaves it out)")
        check_digests(entry.path, manifest, rank, ranks)


def _remark(run: RunConfig, path: str, manifest: SetManifest) -> None:
    """Say what a set does not allow to be sure of."""
    if manifest.digests is None:
        message(
            f"{path} was prepared by an earlier version: damage to its files cannot be noticed, and held-out documents "
            "may repeat others; prepare it again to have both"
        )
    known, fraction = manifest.vocabulary_held_out, run.data.validation_fraction
    if known is not None and fraction > known:
        message(
            f"{path}: its vocabulary was trained for data.validation_fraction {known:g}, and knows part of the text "
            f"that {fraction:g} holds out; prepare it with --validation-fraction {fraction:g}"
        )
