"""`llada prepare --verify PREFIX`: whether a prepared set is still as it was written."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.console import emit_json, size_text
from llada_megatron.llada_moe.errors import DataError


def run(args: argparse.Namespace) -> int:
    """Compare the set `args.verify` with its manifest; raises DataError where it differs or has no digests."""
    from llada_megatron.llada_moe.data.digests import check_digests, size_of
    from llada_megatron.llada_moe.data.set_manifest import read_manifest, tokenizer_of

    prefix = Path(args.verify)
    manifest = read_manifest(prefix)
    if manifest.digests is None:
        raise DataError(f"{prefix}: prepared by an earlier version, without digests to compare with; prepare it again")
    check_digests(prefix, manifest)
    tokenizer_of(prefix, manifest)
    size = size_of(prefix, manifest)
    print(f"{prefix}: {len(manifest.digests) + 1} files as they were prepared ({size_text(size)} and the tokenizer)")
    if args.json:
        emit_json({"prefix": str(prefix), "sha256": manifest.sha256, "bytes": size})
    return 0
