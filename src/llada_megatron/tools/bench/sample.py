"""`llada bench sample`: every sampling preset on small models that have learnt a language, beside the peers' samplers.

All contenders answer the same prompts in turns, in one process and by default on one thread; their time is CPU time.
The models are trained by this project's own training step, once (see `sampling.models`), and their language tells right
from wrong (see `sampling.language`). The reference is the paper's sampler: one token in each step, the whole window, no
cache. The presets stop at the end of text, which does not change what stands before it; where they are compared with a
peer token by token they write the whole window, as the peers do.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench.claims import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.tools.bench.sampling.contenders import Candidate, Contender, OurCandidate
    from llada_megatron.tools.bench.sampling.measuring import Figures
    from llada_megatron.tools.bench.sampling.peers import Peers

BYTES_GOAL, SPEED_GOAL, DUAL_TIME_GOAL, BUSY_GOAL = 64, 20.0, 0.65, 1.2
QUALITY_LOSS = 0.02
"""Right sentences that a preset of equal quality may lack, as a share of all."""
_BATCHED = 5
"""Presets that are run in batches besides: the fastest ones at equal quality."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and on how much."""
    cache = Path("~/.cache/llada-megatron/bench")
    parser.add_argument(
        "--models",
        type=Path,
        default=cache,
        metavar="DIR",
        help=f"where the small models are, or are put once they are trained (default {cache})",
    )
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="holds clones of Fast-dLLM and LLaDA, whose own code is run beside"
    )
    parser.add_argument("--presets", metavar="A,B,...", help="only these (default: all)")
    parser.add_argument("--prompts", type=_count, default=16, metavar="N", help="texts to be continued (default 16)")
    parser.add_argument("--rounds", type=_count, default=2, metavar="N", help="the least time of each (default 2)")
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="of the batched runs (default 8)")
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="CPU threads of all (default 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against forward passes per token")
    parser.add_argument(
        "--pipeline", type=_count, metavar="STAGES", help="also: how busy pipeline stages are, on that many processes"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, found {value}")
    return value


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures all contenders, prints a table of them, and returns the claims."""
    import torch

    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.tools.bench.sampling import models
    from llada_megatron.tools.bench.sampling.contenders import runnable
    from llada_megatron.tools.bench.sampling.peers import load_peers

    presets = _presets(args.presets)
    _require_all(args, models.RECIPES["bidirectional"])
    torch.set_num_threads(args.threads)
    if os.getloadavg()[0] > 1:
        message("other processes keep this machine busy: ratios of CPU time scatter, though less than the times")
    paths = _models(args.models.expanduser(), args.threads)
    peers = load_peers(args.peers, paths["bidirectional"]) if args.peers else None
    with _loaded(paths) as loaded:
        entries, reasons = runnable(presets, loaded)
        for preset, reason in reasons.items():
            message(f"{preset} is left out: {reason}")
        claims = _compare(args, entries, loaded, peers)
    claims += _bytes_claims(entries, paths)
    return claims + (_pipeline_claims(args) if args.pipeline else [])


def _presets(names: str | None) -> list[str]:
    """Those that were asked for. Raises ConfigError: one of them does not exist."""
    from llada_megatron.llada_moe.config.parsing import closest
    from llada_megatron.llada_moe.sampling.presets import PRESETS

    chosen = list(PRESETS) if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in PRESETS:
            raise ConfigError(f"--presets: no preset {name!r}{closest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return chosen


def _require_all(args: argparse.Namespace, recipe: object) -> None:
    """Whatever is missing is said before anything long starts."""
    from llada_megatron.tools.bench.sampling.peer_files import import_peers
    from llada_megatron.tools.bench.sampling.picture import require_drawing
    from llada_megatron.tools.bench.sampling.stages import require_stages

    if args.plot:
        require_drawing(args.plot)
    if args.pipeline:
        require_stages(recipe.run, args.pipeline)
    if args.peers:
        import_peers(args.peers)


def _models(directory: Path, threads: int) -> dict[str, Path]:
    """The two small models, trained now unless they were before."""
    from llada_megatron.tools.bench.sampling.models import RECIPES, is_trained, train_or_find

    missing = [recipe for recipe in RECIPES.values() if not is_trained(directory, recipe)]
    if missing:
        count = sum(recipe.steps for recipe in missing)
        message(f"the small models are trained first: {count} steps, some {count / 60:.0f} minutes on one free core")
    return {name: train_or_find(directory, recipe, threads) for name, recipe in RECIPES.items()}


@contextlib.contextmanager
def _loaded(paths: dict[str, Path]) -> Iterator[dict[str, LoadedModel]]:
    """All models at once, in a world of this process alone."""
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.tools.bench.single import single_process

    with single_process():
        yield {name: load_checkpoint(path, LayoutConfig()) for name, path in paths.items()}


def _compare(
    args: argparse.Namespace, entries: Sequence[Candidate], loaded: dict[str, LoadedModel], peers: Peers | None
) -> list[Claim]:
    """One sequence at a time, then the best presets in batches; prints the tables and draws the picture."""
    from llada_megatron.tools.bench.sampling import contenders, measuring, models

    recipe = models.RECIPES["bidirectional"]
    prompts = [recipe.language.held_out(number).prompt for number in range(args.prompts)]
    ours = contenders.OurCandidate(loaded, recipe.new_tokens)
    entrants = _entrants(ours, entries, peers)
    alone = measuring.measure(entrants, prompts, recipe.language, args.rounds, args.batch_size)
    reference = alone[contenders.LLADA_PEER if peers else contenders.LLADA.name + contenders.WHOLE]
    equal = [entry for entry in entries if alone[entry.name].right >= reference.right - QUALITY_LOSS]
    equal.sort(key=lambda entry: alone[entry.name].seconds)
    best = equal[:_BATCHED] if args.batch_size > 1 else []
    batched = [ours.contender(entry, batch_size=args.batch_size) for entry in best]
    together = measuring.measure(batched, prompts, recipe.language, args.rounds, len(prompts)) if batched else {}
    print(f"\nof a sequence, over {args.prompts} prompts; times as fast as {reference.contender.name}:")
    print(measuring.table([*alone.values(), *together.values()], reference), end="\n\n", flush=True)
    if args.plot:
        _draw(args.plot, alone)
    same = _same_claims(alone, recipe.language.eos_id)
    return [
        *_speed_claims(alone, together, [entry.name for entry in equal], reference),
        *same,
        *_batch_claims(alone, together),
    ]


def _entrants(ours: OurCandidate, entries: Sequence[Candidate], peers: Peers | None) -> list[Contender]:
    """Who takes part one sequence at a time; those that are compared closely run one after another."""
    from llada_megatron.tools.bench.sampling.contenders import DUAL, LLADA, peers_contenders

    theirs = peers_contenders(peers, ours.new_tokens) if peers else []
    variants = [ours.contender(DUAL, stop=False, torchs=torchs) for torchs in (False, True)] if DUAL in entries else []
    return [
        ours.contender(LLADA, stop=False),
        *theirs[:2],
        *variants,
        *theirs[2:],
        *(ours.contender(entry, plotted=True) for entry in entries),
    ]


def _speed_claims(
    alone: dict[str, Figures], together: dict[str, Figures], equal: Sequence[str], reference: Figures
) -> list[Claim]:
    """How much faster the fastest preset at equal quality is than the reference."""
    from llada_megatron.tools.bench.sampling.contenders import LLADA, WHOLE

    name = reference.contender.name
    claims = [
        reported(f"sentences that are right, {name}", reference.right, ""),
        reported(f"CPU seconds of a sequence, {name}", reference.seconds, "s"),
    ]
    kind = f"fastest preset at equal quality (at most {QUALITY_LOSS:g} less)"
    if not equal:
        return [*claims, at_least(f"{kind}: there is none", float("nan"), "x", SPEED_GOAL)]
    best = alone[equal[0]]
    claims.append(
        at_least(
            f"{kind}, {equal[0]}, one at a time: times as fast as {name}",
            reference.seconds / best.seconds,
            "x",
            SPEED_GOAL,
        )
    )
    own = alone[LLADA.name + WHOLE]
    if own is not reference:
        claims.append(
            reported(f"{equal[0]}: times as fast as our own {own.contender.name}", own.seconds / best.seconds, "x")
        )
    fitting = [each for each in together.values() if each.right >= reference.right - QUALITY_LOSS]
    if fitting:
        fastest = min(fitting, key=lambda each: each.seconds)
        text = f"{kind} in batches, {fastest.contender.name}: times as fast as {name}"
        claims.append(at_least(text, reference.seconds / fastest.seconds, "x", SPEED_GOAL))
    return [*claims, reported(f"{equal[0]}: sentences that are right", best.right, "")]


def _same_claims(alone: dict[str, Figures], end: int) -> list[Claim]:
    """Against the peers' own code: the same tokens, and in what time; and what an early stop leaves as it is."""
    from llada_megatron.tools.bench.sampling.contenders import DUAL, DUAL_PEER, LLADA, LLADA_PEER, TORCHS, WHOLE
    from llada_megatron.tools.bench.sampling.measuring import same_tokens

    claims, same = [], "sequences with the same tokens"
    own, theirs = alone[LLADA.name + WHOLE], alone.get(LLADA_PEER)
    if theirs:
        claims.append(at_least(f"fixed steps: {same} as {LLADA_PEER}", same_tokens(own, theirs), "", 1.0))
        claims.append(reported(f"fixed steps: CPU time / that of {LLADA_PEER}", own.seconds / theirs.seconds, "x"))
    name = DUAL.name
    dual, theirs = alone.get(name + WHOLE), alone.get(DUAL_PEER)
    if dual and theirs:
        text, torchs = f"CPU time / that of {DUAL_PEER}", alone[name + WHOLE + TORCHS]
        claims += [
            at_least(f"{name}: {same} as {DUAL_PEER}", same_tokens(dual, theirs), "", 1.0),
            at_most(f"{name}, the same whole window: {text}", dual.seconds / theirs.seconds, "x", DUAL_TIME_GOAL),
            reported(f"the same with torch's own matrix products: {text}", torchs.seconds / theirs.seconds, "x"),
            reported(f"the same with an early stop: {text}", alone[name].seconds / theirs.seconds, "x"),
        ]
    for preset in (LLADA.name, name):
        if preset in alone and preset + WHOLE in alone:
            share = same_tokens(alone[preset], alone[preset + WHOLE], end)
            claims.append(at_least(f"{preset}: {same} up to the end of text with an early stop", share, "", 1.0))
    return claims


def _batch_claims(alone: dict[str, Figures], together: dict[str, Figures]) -> list[Claim]:
    from llada_megatron.tools.bench.sampling.measuring import same_tokens

    claims = []
    for name, batch in together.items():
        single = alone[name.rpartition(", batch ")[0]]
        claims.append(reported(f"{name}: times as fast as one at a time", single.seconds / batch.seconds, "x"))
        claims.append(reported(f"{name}: sequences with the same tokens as alone", same_tokens(batch, single), ""))
    return claims


def _bytes_claims(entries: Sequence[Candidate], paths: dict[str, Path]) -> list[Claim]:
    """The most that leaves a rank for a row, over all presets, greedy and at temperature 1."""
    from llada_megatron.tools.bench.sampling.packets import LAYOUTS, bytes_per_row

    claims = []
    for name, layout in LAYOUTS.items():
        counted = bytes_per_row(paths, entries, layout)
        (preset, temperature), most = max(counted.items(), key=lambda entry: entry[1])
        text = f"bytes that leave a rank per row and step, {name}, all presets (most: {preset}, temperature"
        claims.append(at_most(f"{text} {temperature:g})", most, "bytes", BYTES_GOAL))
    return claims


def _pipeline_claims(args: argparse.Namespace) -> list[Claim]:
    from llada_megatron.tools.bench.sampling.models import RECIPES
    from llada_megatron.tools.bench.sampling.stages import measure_stages

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


def _draw(path: Path, alone: dict[str, Figures]) -> None:
    from llada_megatron.tools.bench.sampling.picture import Point, draw

    plotted = [each for each in alone.values() if each.contender.plotted]
    points = [Point(p.contender.name, p.forwards_per_token, p.right, p.contender.peer) for p in plotted]
    draw(path, [point for point in points if math.isfinite(point.forwards)])
    message(f"the picture is in {path}")
