"""`llada bench ar-to-diffusion`: is an autoregressive model better converted over growing blocks, or at once, or not?

A run that begins as an autoregressive model and is converted by the stages of LLaDA2.0 is compared with the same run
without the warm-up (the whole window at once), and with masked diffusion from scratch: over as many tokens as the
conversion, and over as many as the autoregressive part and the conversion together. Several seeds each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.config.block_schedule import tokens_per_step
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, at_least, reported
from llada_megatron.tools.bench.conversion_arms import (
    ARMS,
    BLOCKS,
    FOLDERS,
    SCHEDULE,
    WHOLE,
    TrainedArm,
    arms_of,
    trained,
)

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.parallel.evaluation.assessment import Baselines

Found = Mapping[str, Sequence[TrainedArm]]
"""By the name of the arm, one for each seed, in the same order of seeds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, how many seeds, and where."""
    parser.add_argument(
        "--run", default="ar-to-diffusion", metavar="RUN", help="YAML file of the run, or a name in configs/runs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values laid over the run's")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kind (default 3)")
    parser.add_argument("--windows", type=int, default=128, metavar="N", help="held-out windows (default 128)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/bench-ar-to-diffusion"),
        metavar="DIR",
        help="folder of all runs; what is finished there is not done again (default runs/bench-ar-to-diffusion)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the bounds along the runs")


def run(args: argparse.Namespace) -> list[Claim]:
    """Bounds of all arms, and by how much the schedule's are lower.

    Raises:
        LladaError: the run has no such stages, or its text is not prepared.
    """
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.llada_moe.config import load_run
    from llada_megatron.tools.bench.conversion_picture import draw
    from llada_megatron.tools.bench.sampling.picture import require_drawing

    for name in ("seeds", "windows"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least 1")
    if args.plot:
        require_drawing(args.plot)
    base = load_run(args.run, args.overrides, message)
    arms = arms_of(base)
    found: dict[str, list[TrainedArm]] = {name: [] for name in ARMS}
    for seed in range(args.seeds):
        for name, each in arms.items():
            folder = args.output / f"{FOLDERS[name]}-{seed}"
            message(f"seed {seed}, {name}: {each.training.steps} steps, in {folder}")
            found[name].append(trained(each, seed, folder, args.windows))
    others = baselines(base, args.windows)
    print(table(found, arms), end="\n\n", flush=True)
    if args.plot:
        draw(args.plot, found, base, others)
        message(f"the picture is in {args.plot}")
    return claims(found, others)


def baselines(base: RunConfig, windows: int) -> Baselines:
    """What the same windows cost without a neural model."""
    from llada_megatron.llada_moe.data.set_manifest import tokenizer_of
    from llada_megatron.llada_moe.data.training_data import TrainingData
    from llada_megatron.parallel.evaluation.assessment import baselines_of

    run = replace(base, training=replace(base.training, seed=0))
    training, held_out = TrainingData(run), TrainingData(run, "validation")
    tokenizer = tokenizer_of(base.data.sets[0].path, training.manifests[0])
    return baselines_of(training, held_out, range(windows), base.model.vocab_size, tokenizer)


def claims(found: Found, others: Baselines) -> list[Claim]:
    """How far the schedule's bounds lie below those of the other arms, and all bounds."""
    said = [_claim(found, name, figure) for figure in (BLOCKS, WHOLE) for name in ARMS[1:]]
    for name in ARMS:
        for figure in (BLOCKS, WHOLE):
            values = [one.last[figure] for one in found[name]]
            said.append(reported(f"bound over {figure}, {name} (± {spread(values):.3f})", mean(values), "bits/byte"))
    parents = [one.autoregressive_cost for one in found[SCHEDULE]]
    return [
        *said,
        reported(f"cost under the autoregressive model before (± {spread(parents):.3f})", mean(parents), "bits/byte"),
        reported("cost under unigrams", others.unigram, "bits/byte"),
        reported("cost under bigrams", others.bigram, "bits/byte"),
        reported("zlib", others.zlib, "bits/byte"),
    ]


def _claim(found: Found, name: str, figure: str) -> Claim:
    """By how much an arm's bound is larger than the schedule's. Twice the standard error of the mean is what chance
    may give; one seed has no error, and shows nothing."""
    pairs = zip(found[name], found[SCHEDULE], strict=True)
    gains = [other.last[figure] - ours.last[figure] for other, ours in pairs]
    text = f"bound over {figure}: how much lower the schedule's is than that of: {name}"
    if len(gains) < 2:
        return reported(text, gains[0], "bits/byte")
    chance = 2 * spread(gains) / len(gains) ** 0.5
    return at_least(f"{text} (goal: two standard errors)", mean(gains), "bits/byte", chance)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 of one."""
    return stdev(values) if len(values) > 1 else 0.0


def table(found: Found, arms: Mapping[str, RunConfig]) -> str:
    """A line for each arm: what it took, and its bounds at the end."""
    rows = [("run", "steps", "tokens", "CPU s", f"bound over {BLOCKS}", f"bound over {WHOLE}")]
    for name, each in found.items():
        steps, size = arms[name].training.steps, tokens_per_step(arms[name].training)
        bounds = [[one.last[figure] for one in each] for figure in (BLOCKS, WHOLE)]
        rows.append(
            (
                name,
                str(steps),
                f"{steps * size:,}",
                f"{mean(one.cpu_seconds for one in each):.0f}",
                *(f"{mean(values):.3f} ± {spread(values):.3f}" for values in bounds),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
