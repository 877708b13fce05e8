"""`llada prepare --chat`: conversations to tokens, with the answers that fine-tuning learns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.tools.reading_options import reading_of
from llada_megatron.tools.split_options import held_out_share

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.answers import AnswerWriter
    from llada_megatron.llada_moe.data.chat_records import ChatRecord
    from llada_megatron.llada_moe.data.indexed import TokenWriter
    from llada_megatron.llada_moe.data.set_manifest import SetManifest, TokenizerFacts
    from llada_megatron.llada_moe.data.sources import CorpusFile
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.parallel.sampling.answer_spans import ChatTokens
    from llada_megatron.parallel.sampling.chat_template import ChatTemplate

_EXAMPLES_SHOWN = 3


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the inputs are conversations (records with `messages`, and `tools` if there are): fine-tuning learns the "
        "assistant's messages",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chat template: llada, plain (for trained vocabularies), or a file with a Jinja template (default: the "
        "one beside the tokenizer)",
    )


def check_chat_arguments(args: argparse.Namespace) -> None:
    """Options that do not go together. Raises ConfigError."""
    if not args.chat:
        if args.template is not None:
            raise ConfigError("--template goes with --chat")
        return
    if args.deduplicate:
        raise ConfigError("--deduplicate compares texts, not conversations; leave it out with --chat")
    if args.format == "text":
        raise ConfigError("--format text goes without --chat: conversations are JSON records")
    if args.train_tokenizer and args.template is None:
        raise ConfigError(
            "--train-tokenizer with --chat needs --template plain or FILE: a new vocabulary has no chat template"
        )


@dataclass
class _Counts:
    """What was met in the inputs."""

    documents: list[int]
    bytes: list[int]
    broken: list[str] = field(default_factory=list)
    longest: int = 0
    records: int = 0
    """Those that `chat_texts` counts."""
    rewritten: int = 0
    """Conversations whose history the template writes anew for each answer."""


def write_chats(
    args: argparse.Namespace,
    sources: Sequence[CorpusFile],
    tokenizer: Tokenizer,
    facts: TokenizerFacts,
    prefix: Path,
    advance: Callable[[int], None],
) -> SetManifest:
    """Write PREFIX.bin, .idx, .bytes and .answers; returns the manifest.

    Raises:
        DataError: there is no chat template, or no conversation to learn from, or more than --skip-broken allows cannot
            be used.
    """
    from llada_megatron.llada_moe.data.answers import AnswerWriter
    from llada_megatron.llada_moe.data.indexed import TokenWriter, token_dtype
    from llada_megatron.llada_moe.data.sources import size_on_disk
    from llada_megatron.parallel.sampling.chat_template import find_template

    template = find_template(tokenizer, args.template)
    counts = _Counts([0] * len(args.inputs), [0] * len(args.inputs))
    writer, answers = TokenWriter(prefix, token_dtype(tokenizer.vocab_size)), AnswerWriter(prefix)
    try:
        for source in sources:
            for record, chats in _tokens(args, source, template, counts):
                _write(chats, record, source.input, tokenizer.eos_id, writer, answers, counts)
            advance(size_on_disk(source.path))
        if writer.documents == 0:
            raise DataError(f"{', '.join(args.inputs)}: no conversation to learn from")
    except BaseException:
        writer.abandon()
        raise
    finally:
        answers.close()
    writer.finish()
    _report(counts)
    return _manifest(args, sources, template, facts, prefix, writer, answers, counts)


def _manifest(
    args: argparse.Namespace,
    sources: Sequence[CorpusFile],
    template: ChatTemplate,
    facts: TokenizerFacts,
    prefix: Path,
    writer: TokenWriter,
    answers: AnswerWriter,
    counts: _Counts,
) -> SetManifest:
    import numpy as np

    from llada_megatron.llada_moe.data.digests import digests_of
    from llada_megatron.llada_moe.data.indexed import token_dtype
    from llada_megatron.llada_moe.data.set_manifest import ANSWERS, ChatFacts, SetManifest, SourceFacts

    files = [sum(source.input == number for source in sources) for number in range(len(args.inputs))]
    found = zip(args.inputs, files, counts.documents, counts.bytes, strict=True)
    return SetManifest(
        tokenizer=facts,
        documents=writer.documents,
        tokens=writer.tokens,
        bytes=sum(counts.bytes),
        dtype=np.dtype(token_dtype(facts.vocab_size)).name,
        sources=[SourceFacts(input=name, files=files, documents=d, bytes=b) for name, files, d, b in found],
        vocabulary_held_out=_held_out(args, counts, writer.documents) if args.train_tokenizer else None,
        digests=digests_of(prefix, (".bin", ".idx", ".bytes", ANSWERS)),
        chat=ChatFacts(
            answers=answers.answers,
            answer_tokens=answers.tokens,
            longest=counts.longest,
            template=template.template,
        ),
    )


def _held_out(args: argparse.Namespace, counts: _Counts, documents: int) -> float:
    """The share of the documents that `chat_texts` left out: it knows records, which are documents if each is one."""
    return held_out_share(args) if counts.records == documents and not counts.rewritten else 0.0


def chat_texts(args: argparse.Namespace, sources: Sequence[CorpusFile]) -> Iterator[str]:
    """The contents of the messages that a run will train on, for a vocabulary. Raises DataError as `write_chats`."""
    from llada_megatron.llada_moe.data.chat_records import chat_records
    from llada_megatron.llada_moe.data.near_duplicates import in_training_part

    # `write_chats` counts and reports the others
    records = (record for record in chat_records(sources, reading_of(args)) if not isinstance(record, DataError))
    for number, record in enumerate(records):
        if in_training_part(None, number, held_out_share(args)):
            yield from (content for message in record.messages if (content := message["content"]))


def _tokens(
    args: argparse.Namespace, source: CorpusFile, template: ChatTemplate, counts: _Counts
) -> Iterator[tuple[ChatRecord, list[ChatTokens]]]:
    """The conversations of a file that can be used. Raises DataError at one too many that cannot."""
    from llada_megatron.llada_moe.data.chat_records import chat_records
    from llada_megatron.parallel.sampling.answer_spans import chat_tokens

    for record in chat_records([source], reading_of(args)):
        try:
            if isinstance(record, DataError):
                raise record
            counts.records += 1
            yield record, chat_tokens(template, record)
        except DataError as error:
            counts.broken.append(str(error))
            if len(counts.broken) > args.skip_broken:
                allowed = f" (more than the {args.skip_broken} broken records of --skip-broken)"
                raise DataError(f"{error}{allowed if args.skip_broken else ''}") from error


def _write(
    chats: Sequence[ChatTokens],
    record: ChatRecord,
    number: int,
    eos_id: int,
    writer: TokenWriter,
    answers: AnswerWriter,
    counts: _Counts,
) -> None:
    """Append a conversation of input `number`; its text counts once, however many documents it becomes."""
    import numpy as np

    for place, chat in enumerate(chats):
        size = record.text_bytes if place == 0 else 0
        answers.add(chat.answers, writer.tokens)
        writer.add(np.array([*chat.ids, eos_id], np.int32), [len(chat.ids) + 1], [size])
        counts.documents[number] += 1
        counts.bytes[number] += size
        counts.longest = max(counts.longest, len(chat.ids) + 1)
    counts.rewritten += len(chats) > 1


def _report(counts: _Counts) -> None:
    """Say what was left out, and what became of conversations that a template writes anew."""
    if counts.broken:
        shown = "; ".join(counts.broken[:_EXAMPLES_SHOWN])
        more = ", …" if len(counts.broken) > _EXAMPLES_SHOWN else ""
        message(f"left out {len(counts.broken)} conversations (--skip-broken): {shown}{more}")
    if counts.rewritten:
        message(
            f"{counts.rewritten} conversations became one document for each answer: the chat template writes earlier "
            "turns otherwise once others follow. data.validation_fraction holds out documents, so that answers of one "
            "conversation may stand in both parts"
        )
