"""What a trained model is worth on held-out text: figures beside baselines, fillings one can read, expert load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.data.training_data import TrainingData
from llada_megatron.llada_moe.evaluation import baselines, infilling, likelihood
from llada_megatron.llada_moe.evaluation.near_duplicate_share import near_duplicate_share
from llada_megatron.llada_moe.objectives import checkpoint_objective
from llada_megatron.llada_moe.sampling.editors import NoEditor, never_written
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import infilling as gaps_of
from llada_megatron.parallel.expert_load import ExpertLoad
from llada_megatron.parallel.sampling.generator import SequenceGenerator

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

_BATCH = 32
"""Windows of one forward pass."""

_WORDS, _LOOKED_AT = 0.5, 64
"""Examples are chosen among this many windows, those with such a share of lower-case letters first."""


@dataclass(frozen=True)
class TextSpan:
    """A stretch of text: given, or a gap with what stood there and what the model wrote."""

    original: str
    filled: str | None = None
    """None where the text was given."""
    tokens: int = 0
    """How many tokens a gap has; 0 for given text."""
    right: int = 0
    """Tokens of a gap that the model wrote as they were."""


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the same windows without a neural model (`llada_moe.evaluation.baselines`)."""

    unigram: float
    bigram: float
    zlib: float


@dataclass(frozen=True)
class Assessment:
    """Figures over the held-out documents."""

    bits_per_byte: float
    is_bound: bool
    """Whether `bits_per_byte` is an upper bound of the text's cost (diffusion), not the cost (autoregression)."""
    baselines: Baselines
    infill_accuracy: float
    majority_share: float
    near_duplicate_share: float
    """Share of the held-out bytes in documents whose shingles are mostly in training documents."""
    sequences: int
    tokens: int
    expert_tokens: dict[int, list[int]]
    """Tokens that each expert of a layer (from 1) received."""
    examples: list[list[TextSpan]]

    @property
    def gain(self) -> float:
        """By how much the model's bits per byte are below the unigram baseline's, as a share of these."""
        return 1.0 - self.bits_per_byte / self.baselines.unigram

    @property
    def gain_over_bigram(self) -> float:
        """The same against the bigram baseline; below 0 where pairs of tokens tell more than the model."""
        return 1.0 - self.bits_per_byte / self.baselines.bigram


def assess(loaded: LoadedModel, tokenizer: Tokenizer, sequences: int, examples: int = 3) -> Assessment:
    """Measure the model on the first `sequences` held-out windows of its run's data."""
    run = replace(
        loaded.run, training=replace(loaded.run.training, global_batch_size=sequences)
    )  # strata of t: all of them
    training, held_out = TrainingData(run), TrainingData(run, "validation")
    numbers = range(sequences)
    load = ExpertLoad([loaded.model], training=False)
    cost = likelihood.measure(loaded.loss, held_out, numbers, _BATCH)
    expert_tokens = load.reduce()
    load.close()
    filled = infilling.measure(loaded.logits, held_out, tokenizer.mask_id, numbers, _BATCH)
    return Assessment(
        bits_per_byte=cost.bits_per_byte(held_out.bytes_per_token),
        is_bound=checkpoint_objective(run, loaded.metadata).fills_masks,
        baselines=baselines_of(training, held_out, numbers, run.model.vocab_size, tokenizer),
        infill_accuracy=filled.accuracy,
        majority_share=filled.majority_share,
        near_duplicate_share=near_duplicate_share(training.sets, held_out.sets),
        sequences=sequences,
        tokens=cost.tokens,
        expert_tokens=expert_tokens,
        examples=[
            _example(loaded, tokenizer, held_out, n) for n in _readable(tokenizer, held_out, sequences)[:examples]
        ],
    )


def baselines_of(
    training: TrainingData, held_out: TrainingData, numbers: range, vocab_size: int, tokenizer: Tokenizer
) -> Baselines:
    """What the same windows cost under counts of the training split, and compressed."""
    sets, shares = training.sets, training.blend.shares
    windows = [row for batch in likelihood.batches(held_out, numbers, _BATCH) for row in batch.labels.numpy()]

    def weights() -> Iterable[float]:
        return baselines.training_weights(sets, shares)

    counts = baselines.token_counts(baselines.training_windows(sets), weights(), vocab_size)
    unigram = baselines.Unigram.fit(counts)
    bigram = baselines.Bigram.fit(unigram, baselines.training_windows(sets), weights())
    per_token = held_out.bytes_per_token
    return Baselines(
        unigram=unigram.measure(windows).bits_per_byte(per_token),
        bigram=bigram.measure(windows).bits_per_byte(per_token),
        zlib=baselines.zlib_bits_per_byte(windows, tokenizer.decode),
    )


def _readable(tokenizer: Tokenizer, held_out: TrainingData, sequences: int) -> list[int]:
    """Windows in their order, but those that are mostly lower-case letters (words, not tables) before the others."""

    def table(number: int) -> bool:
        text = tokenizer.decode(held_out.batch([number]).labels[0].tolist())
        return sum(character.islower() for character in text) < _WORDS * len(text)

    return sorted(range(min(sequences, _LOOKED_AT)), key=table)


def _example(loaded: LoadedModel, tokenizer: Tokenizer, held_out: TrainingData, number: int) -> list[TextSpan]:
    """One held-out window with 15 % of its tokens filled in, one a step, the most confident first."""
    window = held_out.batch([number]).labels
    gaps = infilling.choose_gaps((1, window.shape[1]), number, infilling.MASKED_SHARE, seed=1)
    draft = gaps_of(window[0].tolist(), gaps[0].tolist(), None)
    excluded = [*never_written(loaded.run.model, NoEditor()), tokenizer.eos_id]
    writer = SequenceGenerator(loaded, Method(logits_processor=LogitsProcessor(excluded=excluded)), batch_size=1)
    filled = next(done.tokens for step in writer.steps([draft]) for done in step.finished)
    return _pieces(tokenizer, draft.tokens, filled, gaps[0].tolist())


def _pieces(tokenizer: Tokenizer, original: list[int], filled: list[int], gaps: list[bool]) -> list[TextSpan]:
    """Cut a window at the edges of its gaps."""
    edges = [i for i in range(1, len(gaps)) if gaps[i] != gaps[i - 1]]
    pieces = []
    for start, stop in zip([0, *edges], [*edges, len(gaps)], strict=True):
        was = tokenizer.decode(original[start:stop])
        if not gaps[start]:
            pieces.append(TextSpan(was))
            continue
        right = sum(a == b for a, b in zip(original[start:stop], filled[start:stop], strict=True))
        pieces.append(TextSpan(was, tokenizer.decode(filled[start:stop]), stop - start, right))
    return pieces
