"""`llada bench cap`: does confidence-aware training let a sampler commit more tokens at once, at equal accuracy?

A run of fine-tuning is continued twice from one checkpoint, over the same conversations with the same masks: with and
without the entropy of correct predictions in the loss (LLaDA2.0, eq. 6). Both answer the same questions, at several
thresholds of confidence.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, at_least, reported
from llada_megatron.tools.bench.equal_accuracy import speed_ratio
from llada_megatron.tools.bench.word_questions import Answers, add_model_arguments, ask, protocol, questions_of

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.optimizer import LearningRateConfig
    from llada_megatron.llada_moe.config.run import RunConfig

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
EQUAL, GOAL = 0.02, 1.05
"""Difference of two accuracies that count as equal, and how much faster confidence must make the sampler."""
_STEPS, _COEFFICIENT = 300, 2.0
_WITHOUT, _WITH = "without confidence", "with confidence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run is continued, how, and what it is asked."""
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="of each continuation (default 300; of --language 120)")
    parser.add_argument(
        "--coefficient",
        type=float,
        metavar="C",
        help="objective.confidence_coefficient (default 2; of --language 60)",
    )
    parser.add_argument(
        "--language",
        action="store_true",
        help="continue the block-causal model of `llada bench sample` instead; it is trained first where it is missing",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of --language: continuations (default 1)")
    parser.add_argument("--prompts", type=int, default=48, metavar="N", help="of --language: texts (default 48)")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("~/.cache/llada-megatron/bench"),
        metavar="DIR",
        help="of --language: where the small models are, or are put (default %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/cap"), metavar="DIR", help="folder of both runs (default runs/cap)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy against tokens per forward pass")


def run(args: argparse.Namespace) -> list[Claim]:
    """Tokens per forward pass of both, at accuracies that are equal to the best of the model without confidence.

    Raises:
        LladaError: there is no such run, or it is not one of fine-tuning.
    """
    from llada_megatron.parallel import device

    device.install()
    for name in ("seeds", "prompts"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least 1")
    if args.language:
        return _on_language(args)
    from llada_megatron.tools.bench.sampling.picture import require_drawing

    questions = questions_of(args)
    if args.plot:
        require_drawing(args.plot)
    schedules = [{"name": "threshold", "threshold": str(value)} for value in THRESHOLDS]
    found = {}
    for name, each in continuations(args).items():
        _train(each)
        found[name] = ask(each.output_dir, questions, schedules)
        if not any(answers.right for answers in found[_WITHOUT]):
            raise ConfigError(
                f"{args.model}: no answer is right after --steps {each.training.steps} without confidence, so that "
                "there is nothing to compare; continue a run that has learnt to answer"
            )
    message(f"protocol: {protocol(len(questions), 'schedule threshold')}")
    print(table(found), end="\n\n", flush=True)
    if args.plot:
        draw(args.plot, found)
        message(f"the picture is in {args.plot}")
    return claims(found)


def _on_language(args: argparse.Namespace) -> list[Claim]:
    from llada_megatron.tools.bench import cap_language

    steps, coefficient = _training(args, cap_language.STEPS, cap_language.COEFFICIENT)
    models = args.models.expanduser()
    return cap_language.run(models, args.seeds, steps, coefficient, args.prompts, EQUAL, GOAL)


def _training(args: argparse.Namespace, steps: int, coefficient: float) -> tuple[int, float]:
    """`--steps` and `--coefficient`, or these defaults. Raises ConfigError."""
    chosen = steps if args.steps is None else args.steps, coefficient if args.coefficient is None else args.coefficient
    if chosen[0] < 1:
        raise ConfigError(f"--steps {chosen[0]}: at least 1")
    if chosen[1] <= 0:
        raise ConfigError(f"--coefficient {chosen[1]:g}: greater than 0")
    return chosen


def continuations(args: argparse.Namespace) -> dict[str, RunConfig]:
    """The two runs that go on from the model. Raises ConfigError or CheckpointError."""
    from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of

    steps, confidence = _training(args, _STEPS, _COEFFICIENT)
    step = find_checkpoints(args.model)[0]
    base = run_of(step)
    if not isinstance(base.objective, FineTuningConfig) or base.objective.kind == "autoregressive_sft":
        raise ConfigError(
            f"{step}: a run of kind {base.objective.kind}; confidence-aware training continues kind sft or "
            "block_diffusion_sft"
        )
    return {
        name: dataclasses.replace(
            base,
            training=dataclasses.replace(base.training, steps=steps),
            objective=dataclasses.replace(base.objective, confidence_coefficient=coefficient),
            optimizer=dataclasses.replace(base.optimizer, learning_rate=_rate(base, steps)),
            layout=type(base.layout)(),
            checkpoint=dataclasses.replace(base.checkpoint, interval=steps, load=str(step), asynchronous=False),
            validation=dataclasses.replace(base.validation, interval=0),
            output_dir=str(args.output / name.replace(" ", "-")),
        )
        for name, coefficient in ((_WITHOUT, 0.0), (_WITH, confidence))
    }


def _rate(base: RunConfig, steps: int) -> LearningRateConfig:
    """A tenth of the peak, warmed up and falling."""
    from llada_megatron.llada_moe.config.optimizer import LearningRateConfig

    peak = base.optimizer.learning_rate.peak / 10
    return LearningRateConfig(peak=peak, warmup_steps=steps // 10, decay_steps=steps // 2)


def _train(run: RunConfig) -> None:
    """Train, or go on with, a run in this process."""
    from llada_megatron.llada_moe.config import validate_run
    from llada_megatron.parallel.training.trainer import Trainer
    from llada_megatron.tools.bench.measurement import single_process

    validate_run(run)
    with single_process(run.training.seed):
        Trainer(run).train(lambda: False)


def claims(found: Mapping[str, Sequence[Answers]]) -> list[Claim]:
    """Of the answers by thresholds, without and with confidence: how much faster, where the accuracy is equal."""
    before, after = found[_WITHOUT], found[_WITH]
    best, top = (max(each.accuracy for each in answers) for answers in (before, after))
    return [
        at_least(
            f"tokens per forward pass with confidence against without, where at most {100 * EQUAL:g} points fewer "
            f"answers are right than at best without",
            speed_ratio(before, after, EQUAL),
            "x",
            GOAL,
        ),
        reported("right answers at best, without confidence", 100 * best, "%"),
        reported("right answers at best, with confidence", 100 * top, "%"),
    ]


def table(found: Mapping[str, Sequence[Answers]]) -> str:
    """A line for each threshold."""
    rows = [("threshold", *(f"{name}: {what}" for name in found for what in ("tokens/forward", "right", "in format")))]
    for number, threshold in enumerate(THRESHOLDS):
        cells = []
        for name in found:
            each = found[name][number]
            share = 100 / each.questions
            cells += [
                f"{each.tokens_per_forward:.2f}",
                f"{share * each.right:.1f} %",
                f"{share * each.in_format:.1f} %",
            ]
        rows.append((f"{threshold:g}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(path: Path, found: Mapping[str, Sequence[Answers]]) -> None:
    """Write the picture: the more tokens per forward pass and the more right answers, the better."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7.0, 5.0), dpi=150, facecolor="white", layout="constrained").add_subplot()
    for (name, answers), marker in zip(found.items(), ("o", "s"), strict=True):
        xs, ys = [each.tokens_per_forward for each in answers], [100 * each.accuracy for each in answers]
        axes.plot(xs, ys, marker=marker, label=name)
        for x, y, threshold in zip(xs, ys, THRESHOLDS, strict=True):
            axes.annotate(f"{threshold:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens of an answer per forward pass, by threshold")
    axes.set_ylabel("right answers (%)")
    axes.grid(True, color="#eeeeee")
    axes.legend(frameon=False)
    axes.figure.savefig(path)
