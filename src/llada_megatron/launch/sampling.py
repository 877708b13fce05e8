"""From texts to texts: what `llada sample` does with a loaded model, whatever ranks it is spread over."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llada_megatron.llada_moe.config.schema import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from llada_megatron.llada_moe.config.schema import ModelConfig
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.llada_moe.sampling.canvas import Canvas
    from llada_megatron.parallel.inference import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample."""

    checkpoint: str
    texts: list[str]
    infill: bool = False
    gap_word: str = "mask"
    """Gaps are `<gap_word>` and `<gap_word:N>`."""
    max_new_tokens: int = 64
    steps: int | None = None
    """Forward passes per text; None = one per token."""
    block_length: int | None = None
    """None = one block."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    temperature: float = 0.0
    guidance: float = 0.0
    seed: int = 0
    batch_size: int = 8
    """Texts that run together."""
    tokenizer: str | None = None
    """Where the checkpoint's tokenizer is; None = where it was during training."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)


@dataclass(frozen=True)
class Sample:
    """What became of one text."""

    text: str
    """The whole text."""
    new: str
    """What was written: the continuation, or the fillings joined by newlines."""
    new_tokens: int


Report = Callable[[Sample], None]


def sample_all(loaded: LoadedModel, request: Request, report: Report | None = None) -> tuple[list[Sample], int]:
    """Sample every text of a request, in batches; returns the results and the number of forward passes (collective).

    `report` receives each result when it is there.

    Raises:
        ConfigError: a text without a gap, or too long; a model that fills no masks.
        DataError: the tokenizer is not there, or another one.
    """
    if loaded.run.objective.kind != "diffusion":
        raise ConfigError(f"{loaded.path} is an autoregressive model; llada sample fills masks of a diffusion model")
    tokenizer = checkpoint_tokenizer(loaded, request.tokenizer)
    samples: list[Sample] = []
    passes = 0
    for first in range(0, len(request.texts), request.batch_size):
        texts = request.texts[first : first + request.batch_size]
        canvas = make_canvas(texts, request, tokenizer, loaded.run.model)
        canvas.stream += first
        given = ~canvas.open
        passes += _fill(loaded, tokenizer, canvas, request)
        for row, length in enumerate(canvas.lengths.tolist()):
            samples.append(_finished(tokenizer, canvas.tokens[row, :length], given[row, :length]))
            if report is not None:
                report(samples[-1])
    return samples, passes


def make_canvas(texts: Sequence[str], request: Request, tokenizer: Tokenizer, model: ModelConfig) -> Canvas:
    """Token rows with their open positions. Raises ConfigError where a text has no gap or is too long."""
    from llada_megatron.llada_moe.sampling.canvas import with_gaps

    rows, gaps = [], []
    for text in texts:
        pieces = split_gaps(text, request.gap_word) if request.infill else [text, request.max_new_tokens]
        row: list[int] = []
        gap: list[bool] = []
        for piece in pieces:
            ids = tokenizer.encode(piece) if isinstance(piece, str) else [tokenizer.mask_id] * piece
            row, gap = row + ids, gap + [isinstance(piece, int)] * len(ids)
        if not any(gap):
            raise ConfigError(f"no <{request.gap_word}> to fill in {text[:40]!r}")
        longest = model.max_sequence_length
        if len(row) > longest:
            raise ConfigError(
                f"{text[:40]!r}: {len(row)} tokens with the new ones, the model takes {longest}; shorten it"
            )
        rows.append(row)
        gaps.append(gap)
    return with_gaps(rows, gaps, tokenizer.mask_id, request.block_length)


def split_gaps(text: str, word: str) -> list[str | int]:
    """A text as pieces: strings, and numbers of missing tokens where it has `<word>` or `<word:N>`."""
    pieces: list[str | int] = []
    position = 0
    for match in re.finditer(rf"<{re.escape(word)}(?::(\d+))?>", text):
        pieces += [text[position : match.start()], int(match[1] or 1)]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]


def checkpoint_tokenizer(loaded: LoadedModel, path: str | None = None) -> Tokenizer:
    """The tokenizer of the checkpoint's data. Raises DataError if it is not there, or another one."""
    from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer, require_tokenizer
    from llada_megatron.parallel.checkpoint.search import tokenizer_place

    file = path or tokenizer_place(loaded.path, loaded.facts)
    if file is None or not Path(file).exists():
        where = f"is not at {file}" if file else "is not known (it was imported without one)"
        raise DataError(f"the checkpoint's tokenizer {where}; say where it is with --tokenizer FILE")
    require_tokenizer(file, loaded.facts.get("tokenizer"), loaded.path)
    tokenizer = load_tokenizer(file)
    tokenizer.eos_id, tokenizer.mask_id = loaded.run.model.eos_token_id, loaded.run.model.mask_token_id
    return tokenizer


def _fill(loaded: LoadedModel, tokenizer: Tokenizer, canvas: Canvas, request: Request) -> int:
    """Fill a canvas; returns the number of forward passes."""
    from llada_megatron.llada_moe.sampling.loop import SamplingOptions, sample
    from llada_megatron.llada_moe.sampling.schedules import FixedSteps

    most = int(canvas.open.sum(1).max())
    whole = request.block_length or most
    steps = request.steps or -(-most // whole) * whole  # a step per token, also where the last block is shorter
    unused = range(tokenizer.vocab_size, loaded.run.model.vocab_size)
    options = SamplingOptions(
        mask_id=tokenizer.mask_id,
        excluded=[*unused, *([tokenizer.eos_id] if request.infill else [])],
        stop_id=None if request.infill else tokenizer.eos_id,
        temperature=request.temperature,
        guidance=request.guidance,
        seed=request.seed,
    )
    return sample(loaded.logits, canvas, FixedSteps(steps, request.remasking, request.seed), options)


def _finished(tokenizer: Tokenizer, tokens: Tensor, given: Tensor) -> Sample:
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
