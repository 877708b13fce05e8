"""`llada prepare`: text, folders or JSON lines to tokens that training reads."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.overwriting import refuse_overwriting
from llada_megatron.tools.chat_preparation import add_chat_arguments, check_chat_arguments
from llada_megatron.tools.preparation_progress import no_space, progress
from llada_megatron.tools.reading_options import add_reading_arguments, reading_of, report_dropped, sources_of
from llada_megatron.tools.split_options import (
    add_split_arguments,
    check_split_arguments,
    compare_documents,
    held_out_share,
)

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.corpus import Chunk, Dropped
    from llada_megatron.llada_moe.data.encoding import Encoded, TokenizerChoice
    from llada_megatron.llada_moe.data.formats import Reading
    from llada_megatron.llada_moe.data.near_duplicates import NearDuplicates
    from llada_megatron.llada_moe.data.set_manifest import SetManifest, TokenizerFacts
    from llada_megatron.llada_moe.data.sources import CorpusFile
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer

EXAMPLES = """\
examples:
  llada prepare my_texts/ --output data/mine --train-tokenizer --vocab-size 8192
  llada prepare web.jsonl.zst code/ --output data/mix --tokenizer data/mine.tokenizer.model --jsonl-key content
  zcat dump/*.gz | llada prepare - --output data/web --tokenizer data/mine.tokenizer.model
  llada prepare python-stdlib --output data/python --train-tokenizer --vocab-size 2048
  llada prepare chats.jsonl --chat --output data/chats --tokenizer checkpoints/llada/tokenizer.json
  llada prepare generated-chats --chat --output data/words --train-tokenizer --vocab-size 512 --template plain
  llada prepare --verify data/python

An input is a text file, a folder (entered recursively), JSON lines or a JSON array of records, any of these compressed
(gzip, zstd, bzip2, xz), Parquet, Arrow or a folder saved by `datasets` (with pyarrow), - for standard input,
python-stdlib: the source files of this Python's own standard library without its tests, or generated-chats: short
conversations about words. What a file holds is told by its content. A text file, a record or a row is one document.
Written are PREFIX.bin and .idx (Megatron's format), PREFIX.bytes (text size of each document), PREFIX.repeats
(documents that repeat too much of others to be held out), PREFIX.tokenizer.model or .json, and PREFIX.json, which says
what they hold. With --chat a record is a conversation ({"messages": [{"role": "user", "content": "…"}, …]}), and
PREFIX.answers says which tokens the assistant says. An interrupted run leaves no half set."""
MANIFEST, TOKENS, TOKENIZERS = ".json", (".bin", ".idx", ".bytes"), (".tokenizer.model", ".tokenizer.json")
_PART = "set"
"""Name of the set inside the folder where it is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llada prepare`."""
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder, - (stdin), or python-stdlib")
    parser.add_argument("--output", metavar="PREFIX", help="name of the set: PREFIX.bin, .idx, .json … are written")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="SentencePiece .model or Hugging Face tokenizer.json")
    tokenizer.add_argument(
        "--train-tokenizer", action="store_true", help="train a SentencePiece vocabulary on the inputs"
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids of the vocabulary to train")
    parser.add_argument(
        "--mask-token", metavar="NAME", help="the tokenizer's mask token, where it is not found by itself"
    )
    parser.add_argument(
        "--eos-token", metavar="NAME", help="the tokenizer's end-of-text token, where it is not found by itself"
    )
    add_reading_arguments(parser)
    add_chat_arguments(parser)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenise (default: one per core, at most 16)"
    )
    add_split_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing set of this name")
    parser.add_argument(
        "--verify", metavar="PREFIX", help="prepare nothing: compare a set with the digests in its manifest"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the set; raises DataError or ConfigError."""
    from llada_megatron.llada_moe.data.set_manifest import to_json
    from llada_megatron.tools import set_verification

    _check_arguments(args)
    if args.verify:
        return set_verification.run(args)
    prefix = Path(args.output)
    with no_space(prefix):
        manifest, tokenizer = prepare(args, prefix)
    said = f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.bytes:,} bytes of text"
    print(f"{said} ({manifest.bytes_per_token:.2f} bytes per token)")
    ids = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id}
    print("for its model:", *(f"model.{key}={value}" for key, value in ids.items()))
    if args.json:
        emit_json({"prefix": str(prefix), **to_json(manifest), "bytes_per_token": manifest.bytes_per_token})
    return 0


def prepare(args: argparse.Namespace, prefix: Path) -> tuple[SetManifest, Tokenizer]:
    """Find, tokenise and write; the set appears under its name only when it is whole."""
    from llada_megatron.llada_moe.data.sources import total_size

    _check_free(prefix, args)
    _keep_inputs(args, prefix, [])  # before the folder that pipes are written to is made
    prefix.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".partial", dir=prefix.parent))
    try:
        sources = sources_of(args, folder)
        _keep_inputs(args, prefix, [source.path for source in sources])
        duplicates = None
        if not args.chat:
            with progress("comparing", total_size(sources)) as advance:
                duplicates = compare_documents(args, sources, _workers(args), advance)
        choice = _tokenizer(args, sources, duplicates, folder)
        tokenizer = choice.load()
        if tokenizer.mask_was_added:
            message(f"{choice.path} has no mask token that text cannot produce: id {tokenizer.mask_id} is added for it")
        write = _write_chats if args.chat else _write
        manifest = write(args, sources, duplicates, choice, tokenizer, folder, prefix)
        _publish(folder, prefix, manifest)
        if duplicates is not None:
            message(duplicates.described())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest, tokenizer


@dataclass
class _Tally:
    """What was counted while tokenising."""

    documents: list[int]
    bytes: list[int]
    dropped: Dropped
    read: int = 0
    """Documents with any text, near-duplicates that were dropped included."""
    empty: int = 0

    def add(self, chunk: Chunk, encoded: Encoded, continues: bool, reading: Reading) -> None:
        """Count one chunk; with `continues` its first document has been counted.

        Raises DataError at one broken record too many.
        """
        number = chunk.sources[0].input
        self.documents[number] += len(encoded.lengths) - continues
        self.bytes[number] += sum(encoded.sizes)
        self.empty += encoded.empty
        self.dropped.add(encoded.dropped, reading)


def _write(
    args: argparse.Namespace,
    sources: list[CorpusFile],
    duplicates: NearDuplicates | None,
    choice: TokenizerChoice,
    tokenizer: Tokenizer,
    folder: Path,
    prefix: Path,
) -> SetManifest:
    """Tokenise everything into the folder; returns the manifest."""
    from llada_megatron.llada_moe.data.corpus import Dropped, chunks
    from llada_megatron.llada_moe.data.digests import digests_of
    from llada_megatron.llada_moe.data.encoding import encode_corpus
    from llada_megatron.llada_moe.data.sources import total_size
    from llada_megatron.parallel import device

    device.install()  # before the first import of megatron.core in this process, as everywhere
    from llada_megatron.llada_moe.data.indexed import TokenWriter, token_dtype
    from llada_megatron.llada_moe.data.set_manifest import REPEATS, prefix_file

    workers, reading = _workers(args), reading_of(args)
    tally = _Tally([0] * len(args.inputs), [0] * len(args.inputs), Dropped())
    writer = TokenWriter(folder / _PART, token_dtype(tokenizer.vocab_size))
    try:
        with progress("tokenising", total_size(sources)) as advance:
            for chunk, encoded in encode_corpus(chunks(sources, reading), choice, reading, workers):
                first = tally.read - (not chunk.begins)
                tally.read = first + len(encoded.lengths)
                if duplicates is not None and args.deduplicate:
                    encoded = encoded.without(duplicates.copies_within(first, tally.read))
                continues = not chunk.begins and bool(encoded.lengths)
                writer.add(encoded.tokens, encoded.lengths, encoded.sizes, continues)
                tally.add(chunk, encoded, continues, reading)
                advance(chunk.size)
        if duplicates is not None and tally.read != duplicates.documents:
            raise DataError(
                f"{', '.join(args.inputs)}: changed while they were read (first {duplicates.documents} documents, then "
                f"{tally.read}); prepare them again when nothing writes to them"
            )
    except BaseException:
        writer.abandon()
        raise
    report_dropped(tally.dropped, tally.empty)
    if writer.documents == 0:
        writer.abandon()
        raise DataError(f"{', '.join(args.inputs)}: empty corpus: no document holds any text")
    writer.finish()
    shutil.copyfile(
        choice.path if args.train_tokenizer else tokenizer.path,
        prefix_file(folder / _PART, _tokenizer_ending(tokenizer)),
    )
    if duplicates is not None:
        prefix_file(folder / _PART, REPEATS).write_bytes(duplicates.repeated.astype("<i8").tobytes())
    return replace(
        _manifest(args, sources, tally, tokenizer, writer.tokens, prefix),
        near_duplicates=duplicates.facts() if duplicates else None,
        vocabulary_held_out=held_out_share(args) if args.train_tokenizer else None,
        digests=digests_of(folder / _PART, [*TOKENS, REPEATS] if duplicates else TOKENS),
    )


def _write_chats(
    args: argparse.Namespace,
    sources: list[CorpusFile],
    duplicates: NearDuplicates | None,
    choice: TokenizerChoice,
    tokenizer: Tokenizer,
    folder: Path,
    prefix: Path,
) -> SetManifest:
    """Tokenise conversations into the folder; returns the manifest. They are not compared with each other."""
    from llada_megatron.llada_moe.data.set_manifest import prefix_file
    from llada_megatron.llada_moe.data.sources import total_size
    from llada_megatron.parallel import device

    device.install()  # before the first import of megatron.core in this process, as everywhere
    from llada_megatron.tools.chat_preparation import write_chats

    copy = prefix_file(folder / _PART, _tokenizer_ending(tokenizer))
    shutil.copyfile(choice.path if args.train_tokenizer else tokenizer.path, copy)
    with progress("tokenising", total_size(sources)) as advance:
        return write_chats(args, sources, tokenizer, _tokenizer_facts(tokenizer, prefix), folder / _PART, advance)


def _tokenizer_facts(tokenizer: Tokenizer, prefix: Path) -> TokenizerFacts:
    """What the manifest says of the tokenizer."""
    from llada_megatron.llada_moe.data.set_manifest import TokenizerFacts

    return TokenizerFacts(
        file=prefix.name + _tokenizer_ending(tokenizer),
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
    )


def _manifest(
    args: argparse.Namespace, sources: list[CorpusFile], tally: _Tally, tokenizer: Tokenizer, tokens: int, prefix: Path
) -> SetManifest:
    """The facts of the set."""
    import numpy as np

    from llada_megatron.llada_moe.data.indexed import token_dtype
    from llada_megatron.llada_moe.data.set_manifest import SetManifest, SourceFacts

    found, passed_over = Counter(s.input for s in sources), Counter(s.input for s in tally.dropped.files)
    files = [found[i] - passed_over[i] for i in range(len(args.inputs))]
    return SetManifest(
        tokenizer=_tokenizer_facts(tokenizer, prefix),
        documents=sum(tally.documents),
        tokens=tokens,
        bytes=sum(tally.bytes),
        dtype=np.dtype(token_dtype(tokenizer.vocab_size)).name,
        sources=[
            SourceFacts(input=name, files=files[i], documents=tally.documents[i], bytes=tally.bytes[i])
            for i, name in enumerate(args.inputs)
        ],
    )


def _tokenizer(
    args: argparse.Namespace, sources: list[CorpusFile], duplicates: NearDuplicates | None, folder: Path
) -> TokenizerChoice:
    """The given tokenizer, or one trained on those documents of the inputs that a run will train on."""
    from llada_megatron.llada_moe.data.corpus import sample_texts
    from llada_megatron.llada_moe.data.encoding import TokenizerChoice
    from llada_megatron.llada_moe.data.near_duplicates import in_training_part
    from llada_megatron.llada_moe.data.sentencepiece_tokenizer import train_sentencepiece

    if not args.train_tokenizer:
        return TokenizerChoice(args.tokenizer, args.eos_token, args.mask_token)
    message(f"training a vocabulary of {args.vocab_size}")
    path, fraction = folder / "trained.model", held_out_share(args)
    if args.chat:
        from llada_megatron.tools.chat_preparation import chat_texts

        train_sentencepiece(chat_texts(args, sources), args.vocab_size, path)
        return TokenizerChoice(str(path))

    def wanted(document: int) -> bool:
        return in_training_part(duplicates, document, fraction)

    train_sentencepiece(sample_texts(sources, reading_of(args), wanted=wanted), args.vocab_size, path)
    return TokenizerChoice(str(path))


def _publish(folder: Path, prefix: Path, manifest: SetManifest) -> None:
    """Give the finished files their names; the manifest goes last and is what makes them a set."""
    import json

    from llada_megatron.llada_moe.data.set_manifest import ANSWERS, REPEATS, prefix_file, to_json

    text = json.dumps(to_json(manifest), indent=2, ensure_ascii=False)
    # bytes of file names that are not UTF-8 become JSON escapes, which reading gives back as they were
    prefix_file(folder / _PART, MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    more = [REPEATS] * (manifest.near_duplicates is not None) + [ANSWERS] * (manifest.chat is not None)
    endings = [*TOKENS, *more, f".tokenizer{manifest.tokenizer.suffix}", MANIFEST]
    for ending in endings:
        descriptor = os.open(prefix_file(folder / _PART, ending), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    for old in (MANIFEST, *TOKENS, REPEATS, ANSWERS, *TOKENIZERS):
        prefix_file(prefix, old).unlink(missing_ok=True)
    for ending in endings:
        os.replace(prefix_file(folder / _PART, ending), prefix_file(prefix, ending))


def _check_arguments(args: argparse.Namespace) -> None:
    """Options that do not go together."""
    if args.verify is not None:
        if args.inputs or args.output or args.tokenizer or args.train_tokenizer:
            raise ConfigError("--verify PREFIX goes alone: it compares a set that is prepared, and writes none")
        return
    if not (args.inputs and args.output and (args.tokenizer or args.train_tokenizer)):
        raise ConfigError(
            "needed: INPUT, --output PREFIX, and --tokenizer FILE or --train-tokenizer (llada prepare --help)"
        )
    if args.train_tokenizer and args.vocab_size is None:
        raise ConfigError("--train-tokenizer needs --vocab-size N")
    if not args.train_tokenizer and args.vocab_size is not None:
        raise ConfigError("--vocab-size goes with --train-tokenizer; a tokenizer file has its own")
    if args.train_tokenizer and (args.mask_token or args.eos_token):
        raise ConfigError("--mask-token and --eos-token go with --tokenizer; a trained vocabulary has <mask> and </s>")
    check_split_arguments(args)
    check_chat_arguments(args)
    reading_of(args)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least 1")
    if not Path(args.output).name or Path(args.output).is_dir():
        raise ConfigError(f"--output {args.output}: name a prefix such as {Path(args.output) / 'corpus'}, not a folder")


def _check_free(prefix: Path, args: argparse.Namespace) -> None:
    """Refuse to replace files that exist, unless that was asked for, or the file is the given tokenizer."""
    from llada_megatron.llada_moe.data.set_manifest import ANSWERS, REPEATS, prefix_file

    outputs = [prefix_file(prefix, ending) for ending in (*TOKENS, MANIFEST, REPEATS, ANSWERS, *TOKENIZERS)]
    given = Path(args.tokenizer) if args.tokenizer else None
    standing = [each for each in outputs if each.exists() and not (given and given.exists() and each.samefile(given))]
    if standing and not args.overwrite:
        raise DataError(
            f"{', '.join(map(str, standing))} already there; give another --output, or --overwrite to replace the set"
        )


def _keep_inputs(args: argparse.Namespace, prefix: Path, sources: list[Path]) -> None:
    """Refuse a set that would overwrite a file of the corpus, or the tokenizer by something else. Raises ConfigError.

    PREFIX.tokenizer.model or .json may be the given tokenizer: it is replaced by its own copy.
    """
    from llada_megatron.llada_moe.data.set_manifest import ANSWERS, REPEATS, prefix_file

    outputs = [prefix_file(prefix, ending) for ending in (*TOKENS, MANIFEST, REPEATS, ANSWERS)]
    refuse_overwriting("--output", outputs, [args.tokenizer])
    refuse_overwriting("--output", [*outputs, *(prefix_file(prefix, ending) for ending in TOKENIZERS)], sources)


def _workers(args: argparse.Namespace) -> int:
    """Processes that read and tokenise."""
    return args.workers or min(16, _cores())


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenizer_ending(tokenizer: Tokenizer) -> str:
    """Ending of the tokenizer's copy beside the set."""
    return f".tokenizer{tokenizer.path.suffix}"
