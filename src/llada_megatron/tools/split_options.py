"""Options of `llada prepare` about near-duplicates and held-out documents."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.reading_options import reading_of

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.near_duplicates import NearDuplicates
    from llada_megatron.llada_moe.data.sources import CorpusFile


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="data.validation_fraction of the runs to come: a vocabulary is trained on the other documents "
        "(default: 0.01, as of a run)",
    )
    duplicates = parser.add_mutually_exclusive_group()
    duplicates.add_argument(
        "--deduplicate", action="store_true", help="drop near-duplicates of earlier documents (they are always counted)"
    )
    duplicates.add_argument(
        "--no-near-duplicate-check",
        action="store_true",
        help="do not compare the documents: saves reading them once more, and held-out ones may repeat others",
    )


def check_split_arguments(args: argparse.Namespace) -> None:
    """Refuse a share that cannot be, or that nothing would use. Raises ConfigError."""
    if args.validation_fraction is None:
        return
    if not args.train_tokenizer:
        raise ConfigError("--validation-fraction goes with --train-tokenizer; another tokenizer is trained already")
    if not 0 <= args.validation_fraction < 1:
        raise ConfigError(f"--validation-fraction {args.validation_fraction:g}: at least 0 and less than 1")


def held_out_share(args: argparse.Namespace) -> float:
    """The share of the documents that a run will hold out."""
    from llada_megatron.llada_moe.config.data import VALIDATION_FRACTION

    return VALIDATION_FRACTION if args.validation_fraction is None else args.validation_fraction


def compare_documents(
    args: argparse.Namespace, sources: Sequence[CorpusFile], workers: int, advance: Callable[[int], None]
) -> NearDuplicates | None:
    """Find near-duplicates; None where that was not wanted."""
    from llada_megatron.llada_moe.data.near_duplicates import find_near_duplicates

    if args.no_near_duplicate_check:
        return None
    return find_near_duplicates(sources, reading_of(args), workers, args.deduplicate, advance)
