"""`llada sample`: continue prompts, or fill the gaps in a text, with a trained checkpoint."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.llada_moe.sampling.canvas import Canvas
    from llada_megatron.parallel.inference import LoadedModel

EXAMPLES = """\
examples:
  llada sample runs/demo --prompt 'def main(' --max-new-tokens 48
  llada sample runs/demo --infill --prompt 'for i in <mask:2>(10):'      two tokens are missing
  llada sample runs/demo --file a.py --file b.py --temperature 0.7 --seed 1
  git show HEAD:setup.py | llada sample runs/demo/checkpoints/step-00000400 --jsonl

With --infill, <mask> stands for one token and <mask:N> for N of them (another word than mask: --gap-word). Without it
these are text like any other. Fewer --steps than tokens write several tokens in a step: faster, and less coherent."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada sample`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output directory, or one of its checkpoints")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a text (may be repeated)")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a file with a text (repeatable)")
    parser.add_argument("--infill", action="store_true", help="fill the gaps of each text instead of continuing it")
    parser.add_argument("--gap-word", default="mask", metavar="WORD", help="gaps are <WORD>, <WORD:N> (default: mask)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length of a continuation (64)")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes per text (default: one per token)")
    parser.add_argument("--block-length", type=int, metavar="N", help="write in blocks of N tokens, left to right")
    parser.add_argument(
        "--remasking", choices=["low_confidence", "random"], default="low_confidence", help="what stays"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest token (default)")
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0 = off)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts that run together")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint's tokenizer is now, if it was moved")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object per text on stdout")


@dataclass(frozen=True)
class Sample:
    """What became of one text."""

    text: str
    """The whole text."""
    new: str
    """What was written: the continuation, or the fillings joined by newlines."""
    new_tokens: int


def run(args: argparse.Namespace) -> int:
    """Sample; raises ConfigError, DataError or CheckpointError."""
    texts = _texts(args)
    _check_arguments(args)
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.parallel.inference import open_checkpoint

    with open_checkpoint(args.checkpoint) as loaded:
        if loaded.run.objective.kind != "diffusion":
            raise ConfigError(
                f"{loaded.path} is an autoregressive model; llada sample fills masks of a diffusion model"
            )
        message(f"sampling with {loaded.path}")
        tokenizer = checkpoint_tokenizer(loaded, args.tokenizer)
        began, passes, samples = time.perf_counter(), 0, []
        for batch in _batches(texts, args.batch_size):
            done, count = sample_texts(loaded, tokenizer, batch, args, first=len(samples))
            _print(done, args, first=len(samples))
            samples, passes = samples + done, passes + count
    seconds = time.perf_counter() - began
    tokens = sum(sample.new_tokens for sample in samples)
    message(f"{tokens} tokens in {passes} forward passes, {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)")
    if args.json:
        facts = {"forward_passes": passes, "seconds": seconds, "new_tokens": tokens, "checkpoint": str(loaded.path)}
        emit_json({"samples": [asdict(sample) for sample in samples], **facts})
    return 0


def sample_texts(
    loaded: LoadedModel, tokenizer: Tokenizer, texts: Sequence[str], args: argparse.Namespace, first: int = 0
) -> tuple[list[Sample], int]:
    """Continue or fill some texts together; returns them and the number of forward passes.

    `first` is the number of the first text, which its random draws depend on.
    """
    from llada_megatron.llada_moe.sampling.loop import SamplingOptions, sample
    from llada_megatron.llada_moe.sampling.schedules import FixedSteps

    canvas = _canvas(loaded, tokenizer, texts, args)
    canvas.stream += first
    given = ~canvas.open
    most = int(canvas.open.sum(1).max())
    unused = range(tokenizer.vocab_size, loaded.run.model.vocab_size)
    options = SamplingOptions(
        mask_id=tokenizer.mask_id,
        excluded=[*unused, *([tokenizer.eos_id] if args.infill else [])],
        stop_id=None if args.infill else tokenizer.eos_id,
        temperature=args.temperature,
        guidance=args.guidance,
        seed=args.seed,
    )
    passes = sample(loaded.logits, canvas, FixedSteps(args.steps or most, args.remasking, args.seed), options)
    rows = range(len(texts))
    return [
        _sample(tokenizer, canvas.tokens[i, : canvas.lengths[i]], given[i, : canvas.lengths[i]]) for i in rows
    ], passes


def checkpoint_tokenizer(loaded: LoadedModel, path: str | None = None) -> Tokenizer:
    """The tokenizer of the checkpoint's data. Raises DataError if it is not there, or another one."""
    from llada_megatron.llada_moe.data.tokenizer import load_tokenizer

    facts = loaded.facts.get("tokenizer", {})
    file = path or facts.get("path")
    if file is None or not Path(file).exists():
        raise DataError(f"the checkpoint's tokenizer is not at {file}; say where it is with --tokenizer FILE")
    tokenizer = load_tokenizer(file)
    if tokenizer.sha256 != facts.get("sha256"):
        raise DataError(f"{file} is not the tokenizer that {loaded.path} was trained with; give that with --tokenizer")
    tokenizer.eos_id, tokenizer.mask_id = loaded.run.model.eos_token_id, loaded.run.model.mask_token_id
    return tokenizer


def split_gaps(text: str, word: str) -> list[str | int]:
    """A text as pieces: strings, and numbers of missing tokens where it has `<word>` or `<word:N>`."""
    pieces: list[str | int] = []
    position = 0
    for match in re.finditer(rf"<{re.escape(word)}(?::(\d+))?>", text):
        pieces += [text[position : match.start()], int(match[1] or 1)]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]


def _canvas(loaded: LoadedModel, tokenizer: Tokenizer, texts: Sequence[str], args: argparse.Namespace) -> Canvas:
    """Token rows with their open positions. Raises ConfigError where a text has no gap or is too long."""
    from llada_megatron.llada_moe.sampling.canvas import with_gaps

    rows, gaps = [], []
    for text in texts:
        pieces = split_gaps(text, args.gap_word) if args.infill else [text, args.max_new_tokens]
        row: list[int] = []
        gap: list[bool] = []
        for piece in pieces:
            ids = tokenizer.encode(piece) if isinstance(piece, str) else [tokenizer.mask_id] * piece
            row, gap = row + ids, gap + [isinstance(piece, int)] * len(ids)
        if not any(gap):
            raise ConfigError(f"no <{args.gap_word}> to fill in {text[:40]!r}")
        longest = loaded.run.model.max_sequence_length
        if len(row) > longest:
            raise ConfigError(
                f"{text[:40]!r}: {len(row)} tokens with the new ones, the model takes {longest}; shorten it"
            )
        rows.append(row)
        gaps.append(gap)
    return with_gaps(rows, gaps, tokenizer.mask_id, args.block_length)


def _sample(tokenizer: Tokenizer, tokens: Tensor, given: Tensor) -> Sample:
    """Text of one finished row (`tokens` int64, `given` bool, both `[seq]`), up to an end of text that was written."""
    ids, kept = tokens.tolist(), given.tolist()
    ends = [i for i, (token, old) in enumerate(zip(ids, kept, strict=True)) if token == tokenizer.eos_id and not old]
    end = ends[0] if ends else len(ids)
    runs: list[list[int]] = []
    for i in range(end):
        if not kept[i]:
            if i == 0 or kept[i - 1]:
                runs.append([])
            runs[-1].append(ids[i])
    return Sample(tokenizer.decode(ids[:end]), "\n".join(map(tokenizer.decode, runs)), sum(map(len, runs)))


def _texts(args: argparse.Namespace) -> list[str]:
    """The texts of the command line; of stdin when it names none. Raises DataError for a file that is not text."""
    texts = list(args.prompt)
    for name in args.file:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 text ({error})") from error
    if texts:
        return texts
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("nothing to sample from: give --prompt TEXT, --file FILE, or a text on standard input")
    return [sys.stdin.read()]


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing."""
    for name in ("max_new_tokens", "steps", "block_length", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature}: 0 or more")
    if not Path(args.checkpoint).is_dir():
        raise CheckpointError(f"there is no checkpoint at {args.checkpoint}")


def _batches(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _print(samples: Sequence[Sample], args: argparse.Namespace, first: int) -> None:
    """Results on stdout: JSON lines, or the texts themselves, told apart by a line each where there are several."""
    if args.json:
        return
    several = len(args.prompt) + len(args.file) > 1
    for number, sample in enumerate(samples, start=first + 1):
        if args.jsonl:
            emit_json({"number": number, **asdict(sample)})
        elif several:
            print(f"==> {number} <==\n{sample.text}", flush=True)
        else:
            print(sample.text, flush=True)
