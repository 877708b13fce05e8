"""The result of the demo as JSON, as a page of Markdown, and as text for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llada_megatron.parallel.evaluation.assessment import Assessment, TextSpan

GAIN_GOAL, INFILL_GOAL = 0.25, 3.0
"""The demo's goals: bits per byte lower than the unigram baseline's by this share; infilling accuracy this many times
the share of the commonest token."""
BIGRAM_GOAL = 0.0
"""A goal beyond, not required: bits per byte lower than the bigram baseline's by more than this share."""
_BARS = "▁▂▃▄▅▆▇█"
BOLD, GREEN, RED, DIM = "1", "32", "31", "2"

Paint = Callable[[str, str], str]
"""paint(text, ANSI colour code) -> text, coloured where the output shows colours."""


@dataclass(frozen=True)
class ResultPaths:
    """The paths that the report names."""

    checkpoint: str
    tensorboard: str
    report: str


def as_json(result: Assessment, seconds: dict[str, float], peak_memory_gb: float, paths: ResultPaths) -> dict[str, Any]:
    """The content of `report.json`. Times are in seconds, also of phases whose results an earlier run has made."""
    return {
        "bits_per_byte": result.bits_per_byte,
        "bits_per_byte_is": _kind(result),
        "unigram_bits_per_byte": result.baselines.unigram,
        "bigram_bits_per_byte": result.baselines.bigram,
        "zlib_bits_per_byte": result.baselines.zlib,
        "infill_accuracy": result.infill_accuracy,
        "majority_share": result.majority_share,
        "near_duplicate_share": result.near_duplicate_share,
        "seconds": round(sum(seconds.values()), 1),
        "peak_memory_gb": round(peak_memory_gb, 2),
        "seconds_by_phase": {name: round(value, 1) for name, value in seconds.items()},
        "validation_sequences": result.sequences,
        "validation_tokens": result.tokens,
        "expert_tokens": {str(layer): counts for layer, counts in result.expert_tokens.items()},
        "examples": [{"before": before(e), "after": after(e), "original": original(e)} for e in result.examples],
        "checkpoint": paths.checkpoint,
        "tensorboard": paths.tensorboard,
    }


def as_text(
    result: Assessment, seconds: dict[str, float], peak_memory_gb: float, paths: ResultPaths, paint: Paint
) -> str:
    """The text that the demo prints."""
    parts = [paint("Filling in held-out code", BOLD) + " (15 % of the tokens are gaps, written one a step)"]
    for number, example in enumerate(result.examples, start=1):
        parts.append(f"{paint(f'example {number}, before', DIM)}\n{_indent(before(example))}")
        parts.append(f"{paint(f'example {number}, after: {_score(example)}', DIM)}\n{_indent(after(example, paint))}")
    parts.append(
        paint("Tokens of each expert", BOLD) + " (each bar relative to the layer's fullest)\n" + _load_lines(result)
    )
    parts.append(paint("Result", BOLD) + f" (held-out documents, {result.tokens:,} tokens)\n" + _figures(result))
    total = f"{_clock(sum(seconds.values()))} of work, at most {peak_memory_gb:.1f} GB of memory over all processes"
    phases = ", ".join(f"{name} {_clock(value)}" for name, value in seconds.items())
    parts.append(f"{total} ({phases})")
    board = f"tensorboard --logdir {paths.tensorboard}"
    parts.append(f"checkpoint   {paths.checkpoint}\nTensorBoard  {board}\nreport       {paths.report}")
    return "\n\n".join(parts) + "\n"


def as_markdown(result: Assessment, seconds: dict[str, float], peak_memory_gb: float, paths: ResultPaths) -> str:
    """The content of `report.md`."""
    phases = ", ".join(f"{name} {_clock(value)}" for name, value in seconds.items())
    parts = [
        "# Demo: a small LLaDA-MoE",
        _fenced(_figures(result)),
        f"Time: {_clock(sum(seconds.values()))} ({phases}). Memory: {peak_memory_gb:.1f} GB over all processes.",
        f"Checkpoint: `{paths.checkpoint}`. TensorBoard: `tensorboard --logdir {paths.tensorboard}`.",
        "## Filling in held-out code",
        "15 % of the tokens are gaps, marked `«?»`. The model writes one token a step, the one it is surest of.",
    ]
    for number, example in enumerate(result.examples, start=1):
        parts += [f"### Example {number}: {_score(example)}", "Before", _fenced(before(example)), "After"]
        parts += [_fenced(after(example)), "Original", _fenced(original(example))]
    parts += ["## Tokens of each expert", _fenced(_load_lines(result))]
    return "\n\n".join(parts) + "\n"


def before(example: list[TextSpan]) -> str:
    """The text of an example with its gaps, each with one question mark per token."""
    return "".join(piece.original if piece.filled is None else f"«{'?' * piece.tokens}»" for piece in example)


def after(example: list[TextSpan], paint: Paint | None = None) -> str:
    """The text of an example with its gaps filled, in guillemets; with `paint`, green where all tokens are correct."""

    def show(piece: TextSpan) -> str:
        if piece.filled is None:
            return piece.original
        text = f"«{piece.filled}»"
        return paint(text, GREEN if piece.right == piece.tokens else RED) if paint else text

    return "".join(map(show, example))


def original(example: list[TextSpan]) -> str:
    """The original text of an example."""
    return "".join(piece.original for piece in example)


def _score(example: list[TextSpan]) -> str:
    right, gaps = sum(piece.right for piece in example), sum(piece.tokens for piece in example)
    return f"{right} of {gaps} tokens as in the original"


def missed_goals(result: Assessment) -> list[str]:
    """What the demo is required to show and this result does not; a figure that is not a number misses its goal."""
    missed = []
    if not result.gain >= GAIN_GOAL:
        missed.append(f"bits per byte are {result.gain:.1%} below the unigram baseline's, not {GAIN_GOAL:.0%}")
    if not _times(result) >= INFILL_GOAL:
        missed.append(f"infilling is {_times(result):.1f} times the commonest token's share, not {INFILL_GOAL:.0f}")
    return missed


def _kind(result: Assessment) -> str:
    return "upper bound" if result.is_bound else "exact"


def _times(result: Assessment) -> float:
    """Infilling accuracy over the share of the commonest token."""
    return result.infill_accuracy / result.majority_share if result.majority_share else float("nan")


def _figures(result: Assessment) -> str:
    sign, others = "≤ " if result.is_bound else "", result.baselines
    over = result.gain_over_bigram
    bigram = f"{abs(over):.1%} {'below' if over > BIGRAM_GOAL else 'ABOVE'} bigrams (goal: below)"
    return (
        f"bits per byte      {sign}{result.bits_per_byte:.3f} ({_kind(result)}); without a neural model: "
        f"unigrams {others.unigram:.3f}, bigrams {others.bigram:.3f}, zlib {others.zlib:.3f}\n"
        f"                   {result.gain:.1%} below unigrams (goal: {GAIN_GOAL:.0%}), {bigram}\n"
        f"infilling at 15 %  {result.infill_accuracy:.1%} right, commonest token {result.majority_share:.1%}: "
        f"{_times(result):.1f} times (goal: {INFILL_GOAL:.0f})"
    )


def _load_lines(result: Assessment) -> str:
    return "\n".join(_load_line(*entry) for entry in result.expert_tokens.items()) or "(a dense model)"


def _load_line(layer: int, counts: list[int]) -> str:
    most, total = max(*counts, 1), max(sum(counts), 1)
    bars = " ".join(_BARS[round(count / most * (len(_BARS) - 1))] for count in counts)
    shares = " ".join(f"{count / total:4.0%}" for count in counts)
    balance = f"max/mean {max(counts) * len(counts) / total:.2f}, dead {counts.count(0)}"
    return f"layer {layer:>2}  {bars}  {shares}   {balance}"


def _fenced(text: str) -> str:
    return f"````\n{text}\n````"


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
