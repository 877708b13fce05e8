"""`llada bench sample`: every sampling preset on small models that have learnt a language.

All candidates answer the same prompts in turns, in one process and by default on one thread; their time is CPU time.
The models are trained by this project's own training step, once (see `sampling.models`), and their language tells right
from wrong (see `sampling.language`). The reference is the paper's sampler: one token in each step, the whole window, no
cache. The presets stop at the end of text, which does not change what stands before it; where they are compared with
another project's sampler token by token they write the whole window, as those do (`benchmarks/sample_peers.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, at_least, at_most, moved, reported

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.tools.bench.sampling.candidates import Candidate, OurSamplers, PeerCandidates, PresetOnModel
    from llada_megatron.tools.bench.sampling.figures import Figures

BYTES_GOAL, BUSY_GOAL = 64, 1.2
_BATCHED = 5
"""Presets that are run in batches besides: the fastest ones at equal quality."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and on how much."""
    add_options(parser)
    parser.add_argument("--peers", help=argparse.SUPPRESS)  # it was an option of this command once


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the comparison with other projects' samplers has as well."""
    cache = Path("~/.cache/llada-megatron/bench")
    parser.add_argument(
        "--models",
        type=Path,
        default=cache,
        metavar="DIR",
        help=f"where the small models are, or are put once they are trained (default {cache})",
    )
    parser.add_argument("--presets", metavar="A,B,...", help="only these (default: all)")
    parser.add_argument("--prompts", type=_count, default=16, metavar="N", help="texts to be continued (default 16)")
    parser.add_argument("--rounds", type=_count, default=2, metavar="N", help="the least time of each (default 2)")
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="of the batched runs (default 8)")
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="CPU threads of all (default 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against forward passes per token")
    parser.add_argument(
        "--speeds", action="store_true", help="also: every preset slower and faster, and the AUP of each (d3LLM)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="speed and quality of every preset, for llada eval report"
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="also: CUDA graphs against ordinary passes (without a GPU: passes of fixed shape, run from Python)",
    )
    parser.add_argument(
        "--pipeline", type=_count, metavar="STAGES", help="also: how busy pipeline stages are, on that many processes"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, found {value}")
    return value


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures all presets, prints a table of them, and returns the claims."""
    if args.peers is not None:
        raise ConfigError(moved("llada bench sample --peers", f"sample_peers --peers {shlex.quote(args.peers)}"))
    return measure_candidates(args)


def measure_candidates(
    args: argparse.Namespace, load_peers: Callable[[Path, int], PeerCandidates] | None = None
) -> list[Claim]:
    """Measures the presets and, beside them, samplers of other projects.

    Args:
        args: the values of `add_options`.
        load_peers: makes those samplers from the run directory of the model with full attention and the number of
            tokens that each of them writes; None = the presets alone.

    Raises:
        LladaError: what cannot work, before any model is trained.
    """
    import torch

    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.tools.bench.sampling import models
    from llada_megatron.tools.bench.sampling.candidates import runnable

    presets = _presets(args.presets)
    recipe = models.RECIPES["bidirectional"]
    _require_all(args, recipe)
    torch.set_num_threads(args.threads)
    if os.getloadavg()[0] > 1:
        message("other processes keep this machine busy: ratios of CPU time scatter, though less than the times")
    paths = _models(args.models.expanduser(), args.threads, presets)
    peers = load_peers(paths["bidirectional"], recipe.new_tokens) if load_peers else None
    with _loaded(paths) as loaded:
        found, reasons = runnable(presets, loaded)
        for preset, reason in reasons.items():
            message(f"{preset} is skipped: {reason}")
        claims = _compare(args, found, loaded, peers)
        claims += _graph_claims(args, loaded) if args.graphs else []
    claims += _bytes_claims(found, paths)
    return claims + (_pipeline_claims(args) if args.pipeline else [])


def _presets(names: str | None) -> list[str]:
    """The chosen presets. Raises ConfigError: one of them does not exist."""
    from llada_megatron.llada_moe.config.parsing import closest
    from llada_megatron.llada_moe.sampling.presets import PRESETS

    chosen = list(PRESETS) if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in PRESETS:
            raise ConfigError(f"--presets: no preset {name!r}{closest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return chosen


def _require_all(args: argparse.Namespace, recipe: object) -> None:
    """Raises LladaError for what is missing, before anything long starts."""
    from llada_megatron.tools.bench.sampling.picture import require_drawing
    from llada_megatron.tools.bench.sampling.rank_figures import require_stages

    if args.plot:
        require_drawing(args.plot)
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise ConfigError(f"--output {args.output}: give a file in a folder that there is")
    if args.pipeline:
        require_stages(recipe.run, args.pipeline)


def _models(directory: Path, threads: int, presets: Sequence[str]) -> dict[str, Path]:
    """The run directories of the small models by their attention, the joint one only for presets that are for it;
    trained now unless they were before."""
    from llada_megatron.llada_moe.sampling.presets import PRESETS
    from llada_megatron.tools.bench.sampling.models import RECIPES, is_trained, train_or_find

    joint = any(PRESETS[preset].verifies for preset in presets)
    wanted = {name: recipe for name, recipe in RECIPES.items() if name != "joint" or joint}
    missing = [recipe for recipe in wanted.values() if not is_trained(directory, recipe)]
    if missing:
        minutes = sum(recipe.minutes for recipe in missing)
        message(f"the small models are trained first, some {minutes:.0f} minutes on one free core")
    return {name: train_or_find(directory, recipe, threads) for name, recipe in wanted.items()}


@contextlib.contextmanager
def _loaded(paths: dict[str, Path]) -> Iterator[dict[str, LoadedModel]]:
    """All models at once, in a world of this process alone."""
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.tools.bench.measurement import single_process

    with single_process():
        yield {name: load_checkpoint(path, LayoutConfig()) for name, path in paths.items()}


def _compare(
    args: argparse.Namespace,
    presets: Sequence[PresetOnModel],
    loaded: dict[str, LoadedModel],
    peers: PeerCandidates | None,
) -> list[Claim]:
    """One sequence at a time, then the best presets in batches; prints the tables and draws the picture."""
    from llada_megatron.tools.bench.sampling import claims, figures, models
    from llada_megatron.tools.bench.sampling.candidates import LLADA, WHOLE, OurSamplers

    recipe = models.RECIPES["bidirectional"]
    prompts = [recipe.language.held_out(number).prompt for number in range(args.prompts)]
    ours = OurSamplers(loaded, recipe.new_tokens)
    candidates = _candidates(ours, presets, peers)
    alone = figures.measure(candidates, prompts, recipe.language, args.rounds, args.batch_size)
    reference = alone[peers.fixed_steps.name if peers else LLADA.name + WHOLE]
    good = reference.right - claims.QUALITY_LOSS
    equal = [preset for preset in presets if preset.edits and alone[preset.name].right >= good]
    equal.sort(key=lambda preset: alone[preset.name].seconds)
    best = equal[:_BATCHED] if args.batch_size > 1 else []
    batched = [ours.candidate(preset, batch_size=args.batch_size) for preset in best]
    together = figures.measure(batched, prompts, recipe.language, args.rounds, len(prompts)) if batched else {}
    print(f"\nof a sequence, over {args.prompts} prompts; times as fast as {reference.candidate.name}:")
    print(figures.table([*alone.values(), *together.values()], reference), end="\n\n", flush=True)
    areas: dict[str, float | None] = {}
    if args.speeds or args.output:
        areas = _speeds(args, ours, presets, alone)
    if args.plot:
        _draw(args.plot, alone, areas)
    return [
        *claims.speed_claims(alone, together, [preset.name for preset in equal], reference),
        *(claims.peer_claims(alone, peers) if peers else []),
        *claims.edit_claims(alone),
        *claims.stop_claims(alone, recipe.language.eos_id),
        *claims.speculation_claims(alone),
        *claims.batch_claims(alone, together),
    ]


def _speeds(
    args: argparse.Namespace, ours: OurSamplers, presets: Sequence[PresetOnModel], alone: dict[str, Figures]
) -> dict[str, float | None]:
    """Speed and quality of every sampler that is plotted; prints and writes them, and returns the AUP of each."""
    import torch

    from llada_megatron.tools.bench.sampling import models, speed_and_quality

    recipe = models.RECIPES["bidirectional"]
    prompts = [recipe.language.held_out(number).prompt for number in range(args.prompts)]
    tried = presets if args.speeds else []
    swept = speed_and_quality.sweep(ours, tried, alone, prompts, recipe.language, args.batch_size)
    plotted = {name: each for name, each in alone.items() if each.candidate.plotted}
    once = {name: [speed_and_quality.SpeedPoint.of(each, "as published", True)] for name, each in plotted.items()}
    protocol = {
        "prompts": args.prompts,
        "new_tokens": recipe.new_tokens,
        "batch": 1,
        "temperature": 0.0,
        "models": str(args.models),
        "steps_of_training": recipe.steps,
        "torch": torch.__version__,
    }
    record = speed_and_quality.speed_record(once | swept, protocol)
    print(speed_and_quality.area_table(record), record["aup_formula"], sep="\n", end="\n\n", flush=True)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        message(f"speed and quality are in {args.output}")
    return {each["name"]: each["aup"] for each in record["samplers"] if args.speeds}


def _candidates(ours: OurSamplers, presets: Sequence[PresetOnModel], peers: PeerCandidates | None) -> list[Candidate]:
    """The candidates that write one sequence at a time; those that are compared closely run one after another."""
    from llada_megatron.tools.bench.sampling.candidates import DUAL, LLADA

    variants = [ours.candidate(DUAL, stop=False, torchs=torchs) for torchs in (False, True)] if DUAL in presets else []
    return [
        ours.candidate(LLADA, stop=False),
        *([peers.fixed_steps, peers.dual_cache] if peers else []),
        *variants,
        *(peers.others if peers else []),
        *(ours.candidate(preset, plotted=preset.edits) for preset in presets),
    ]


def _bytes_claims(presets: Sequence[PresetOnModel], paths: dict[str, Path]) -> list[Claim]:
    """The most that leaves a rank for a row, over all presets, greedy and at temperature 1."""
    from llada_megatron.tools.bench.sampling.rank_figures import LAYOUTS, bytes_per_row

    claims = []
    for name, layout in LAYOUTS.items():
        counted = bytes_per_row(paths, presets, layout)
        (preset, temperature), most = max(counted.items(), key=lambda item: item[1])
        text = f"bytes that leave a rank per row and step, {name}, all presets (most: {preset}, temperature"
        claims.append(at_most(f"{text} {temperature:g})", most, "bytes", BYTES_GOAL))
    return claims


def _graph_claims(args: argparse.Namespace, loaded: dict[str, LoadedModel]) -> list[Claim]:
    from llada_megatron.tools.bench.sampling import graph_figures, models

    recipe = models.RECIPES["bidirectional"]
    prompts = [recipe.language.held_out(number).prompt for number in range(args.prompts)]
    return graph_figures.graph_claims(loaded, prompts, recipe.new_tokens, args.batch_size, args.rounds)


def _pipeline_claims(args: argparse.Namespace) -> list[Claim]:
    from llada_megatron.tools.bench.sampling.models import RECIPES
    from llada_megatron.tools.bench.sampling.rank_figures import measure_stages

    recipe, stages = RECIPES["bidirectional"], args.pipeline
    if stages > (os.cpu_count() or 1):
        message(f"{stages} stages on {os.cpu_count()} cores wait for cores, whatever they do")
    message(f"pipeline: {stages} stages with one group in flight, and with {stages}")
    prompts = [recipe.language.held_out(number).prompt for number in range(args.prompts)]
    measured = measure_stages(recipe.run, stages, prompts, recipe.new_tokens, args.batch_size, args.rounds)
    one, many = measured[1], measured[stages]
    text = f"pipeline of {stages} stages, {stages} groups in flight against one: "
    return [
        at_least(f"{text}share of the time in which a stage computes", many.mean_busy / one.mean_busy, "x", BUSY_GOAL),
        *(
            reported(f"stages compute, {groups} group{'s' * (groups > 1)} in flight: stage {number}", 100 * share, "%")
            for groups, each in measured.items()
            for number, share in enumerate(each.busy)
        ),
        reported(f"{text}wall time of a sequence", many.seconds / one.seconds, "x"),
    ]


def _draw(path: Path, alone: dict[str, Figures], areas: dict[str, float | None]) -> None:
    from llada_megatron.tools.bench.sampling.picture import Point, draw

    plotted = [each for each in alone.values() if each.candidate.plotted]
    points = [
        Point(p.candidate.name, p.forwards_per_token, p.right, p.candidate.peer, areas.get(p.candidate.name))
        for p in plotted
    ]
    draw(path, [point for point in points if math.isfinite(point.forwards)])
    message(f"the picture is in {path}")
