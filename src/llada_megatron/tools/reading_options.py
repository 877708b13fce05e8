"""Options of `llada prepare` about how its inputs are read, and what is said about them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.corpus import Dropped
    from llada_megatron.llada_moe.data.formats import Reading
    from llada_megatron.llada_moe.data.sources import CorpusFile

_EXAMPLES_SHOWN = 3


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--jsonl-key",
        metavar="KEY",
        help="key or column of the text in records (default: text; of conversations: messages)",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "text"),
        default="auto",
        help="auto: what a file holds is told by its content; text: every file is one document, whatever it looks like",
    )
    parser.add_argument(
        "--skip-broken",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N records that cannot be read, and report them (default: 0, the first one is an error)",
    )


def reading_of(args: argparse.Namespace) -> Reading:
    """How the inputs are read. Raises ConfigError."""
    from llada_megatron.llada_moe.data.formats import Reading

    if args.skip_broken < 0:
        raise ConfigError(f"--skip-broken {args.skip_broken}: at least 0")
    return Reading(args.jsonl_key or ("messages" if args.chat else "text"), args.format == "text", args.skip_broken)


def sources_of(args: argparse.Namespace, spool: Path) -> list[CorpusFile]:
    """The files of the inputs; says what was recognised and what is left out. Raises DataError where there is none.

    `spool` is a folder for what comes through pipes.
    """
    from llada_megatron.llada_moe.data.sources import PYTHON_STDLIB, Notes, find_sources, stdlib_folder

    notes = Notes()
    sources = find_sources(args.inputs, reading_of(args), spool, notes)
    for note in notes.say():
        message(note)
    if not sources:
        raise DataError(f"{', '.join(args.inputs)}: empty corpus: no file found")
    for number, name in enumerate(args.inputs):
        if name == PYTHON_STDLIB:
            count = sum(source.input == number for source in sources)
            message(f"{name}: {count} .py files of {stdlib_folder()}, test suites and installed packages left out")
    return sources


def report_dropped(dropped: Dropped, empty: int) -> None:
    """Say what was passed over while reading, in a line each; `empty` counts documents without a character."""
    from llada_megatron.llada_moe.data.formats import READABLE

    if dropped.files:
        shown = "; ".join(f"{s.name} ({s.reason})" for s in dropped.files[:_EXAMPLES_SHOWN])
        more = ", …" if len(dropped.files) > _EXAMPLES_SHOWN else ""
        message(f"passed over {len(dropped.files)} files that cannot be read as text: {shown}{more}")
        if any(skipped.reason.startswith("not ") for skipped in dropped.files):
            message(f"what can be read: {READABLE}")
    if dropped.broken:
        shown = "; ".join(dropped.first_broken)
        more = ", …" if dropped.broken > len(dropped.first_broken) else ""
        message(f"left out {dropped.broken} broken records (--skip-broken): {shown}{more}")
    if empty:
        message(f"left out {empty} empty documents")
