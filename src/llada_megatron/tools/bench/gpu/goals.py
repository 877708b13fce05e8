"""What the results claim: the figures of the parts beside their goals, and why a figure is missing.

A goal whose figure was not measured does not hold; the claim says why. Without a GPU nothing is judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_least, at_most, reported
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import Part
from llada_megatron.tools.bench.gpu.results_file import DONE, Known, Measurement, ResultsFile

FP32_GOAL = 1e-5
BF16_LOSS_GOAL, BF16_GRADIENTS_GOAL = 2e-3, 0.03
"""Between bf16 and fp32 on one CPU the 24 cases differ by up to 9.6e-4 and 0.0115 (where a token met another
expert)."""
DEMO_FIRST_GOAL, DEMO_GOAL = 1e-5, 2e-2
"""Of the demo's first ten steps, and of fifty. Its learning rate lets differences grow: on a CPU, weights changed by
1e-7 and 1e-6 of themselves moved the first ten losses by 1.5e-7 at most, and one of fifty by 1e-3 and 1e-2."""
UTILIZATION_GOALS = {("dense", 1): 0.60, ("llada-8b", 1): 0.60, ("moe", 1): 0.40, ("moe", 40): 0.36}
FP8_GOALS = {"llada-8b": 1.35, "moe-rank": 1.15}
FP8_LOSS_GOAL, CONTEXT_GOAL = 0.005, 0.8
"""The second is of the loss of a model that sees no other position: else there was nothing that FP8 could spoil."""
ATTENTION_GOAL, LINEAR_GOAL = 5.0, 4.4
"""Four times the positions may take four times the memory, and a tenth more."""
ATTENTION_APART_GOAL = 1e-2
"""Between two kernels in bf16, of the result and of each gradient as a vector (1.5e-3 was measured of the result)."""
LOSS_MEMORY_GOAL, LOSS_APART_GOAL = 0.15, 1e-4
"""The second of fp32 sums over 157,184 in another order (1.6e-5 was measured)."""
GRAPHS_GOAL = 1.5


def claims(results: ResultsFile, machine: Machine, parts: Sequence[Part]) -> list[Claim]:
    """The claims of the chosen parts, in their order; what failed or was left is told as well."""
    known = results.read()
    found = [claim for part in parts for claim in _CLAIMS.get(part.name, _reported)(known, part.name)]
    if machine.toy:
        found = [dataclasses.replace(claim, goal="reported", holds=None) for claim in found]
    return [*found, *(claim for part in parts for claim in _not_done(known, part))]


def _not_done(known: Known, part: Part) -> Iterator[Claim]:
    """A part of which something is left is a failure, whatever its goals, with a GPU and without."""
    status, detail = known.ends.get(part.name, ("not run", "no time was left"))
    if status != DONE:
        message(f"{part.name}: {status}: {detail}; the same command does what is left")
        yield Claim(f"{part.name}: {status}: {detail}", math.nan, "", DONE, False)


def _agreement(known: Known, part: str) -> Iterator[Claim]:
    for ending, text, figure, goal in (
        ("fp32", "fp32 loss and gradients against the CPU", "worst", FP32_GOAL),
        ("bf16", "bf16 loss against fp32 on the CPU", "loss", BF16_LOSS_GOAL),
        ("bf16", "all bf16 gradients against fp32 on the CPU", "all_gradients", BF16_GRADIENTS_GOAL),
        ("model", "the first ten losses of the demo's model against the CPU", "first_ten", DEMO_FIRST_GOAL),
        ("model", "fifty losses of the demo's model against the CPU", "worst", DEMO_GOAL),
    ):
        cases = [each for each in known.of(part) if each.name.endswith(ending)]
        measured = {each.name for each in cases}
        left = [name for name in known.expected.get(part, ()) if name.endswith(ending) and name not in measured]
        yield _worst(f"{part}: {text}", cases, len(left), figure, goal)


def _worst(text: str, cases: Sequence[Measurement], left: int, figure: str, goal: float) -> Claim:
    """The largest of a figure over cases; one that failed, or of which there is no figure, makes it not a number."""
    failed = [each for each in cases if each.error]
    if failed:
        why = f"{failed[0].name}: {failed[0].error}"
        return at_most(f"{text} ({len(failed)} of {len(cases)} failed; {why})", math.nan, "", goal)
    if not cases:
        return at_most(f"{text} (not measured)", math.nan, "", goal)
    worst = max(cases, key=lambda each: _or_infinite(each.figures[figure]))
    value = worst.figures[figure]
    where = f", {worst.figures['where']}" if "where" in worst.figures and figure == "worst" else ""
    if left:
        text = f"{text} ({left} of {left + len(cases)} cases were not reached; of the others at most {value:.3g}, "
        return at_most(f"{text}{worst.name}{where})", math.nan, "", goal)
    return at_most(f"{text}, {len(cases)} cases (worst: {worst.name}{where})", value, "", goal)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _steps(known: Known, part: str) -> Iterator[Claim]:
    wanted = {documents: goal for (owner, documents), goal in UTILIZATION_GOALS.items() if owner == part}
    for each in known.of(part):
        documents = _documents(each.name)
        goal = wanted.pop(documents, None) if each.name.startswith("bf16") else None
        text = f"{part}: {each.name}: model FLOPs of the measured ceiling{_layers(each)}"
        if each.error:
            text = f"{part}: {each.name}: {each.error}"
        value = each.figures.get("of_measured_ceiling", math.nan)
        yield reported(text, value, "") if goal is None else at_least(text, value, "", goal)
        for figure, unit in (("of_named_peak", ""), ("tokens_per_second", "tokens/s"), ("peak_memory_gb", "GB")):
            if figure in each.figures:
                yield reported(f"{part}: {each.name}: {figure.replace('_', ' ')}", each.figures[figure], unit)
    for documents, goal in wanted.items():
        text = f"{part}: bf16, {documents} documents a window: model FLOPs of the measured ceiling: not measured"
        yield at_least(text, math.nan, "", goal)
    yield from _fp8_speed(known, part)


def _fp8_speed(known: Known, part: str) -> Iterator[Claim]:
    """The fastest recipe over bf16, with one document a window."""
    speeds = {
        each.name.partition(",")[0]: each.figures.get("tokens_per_second", math.nan)
        for each in known.of(part)
        if _documents(each.name) == 1
    }
    bf16 = speeds.pop("bf16", math.nan)
    ratios = {name: speed / bf16 for name, speed in speeds.items() if speed == speed}
    if not ratios:
        if part in FP8_GOALS:
            yield at_least(f"{part}: tokens/s in FP8 over bf16: no recipe was measured", math.nan, "x", FP8_GOALS[part])
        return
    best = max(ratios, key=lambda name: ratios[name])
    text = f"{part}: tokens/s in FP8 ({best}, the fastest) over bf16"
    yield at_least(text, ratios[best], "x", FP8_GOALS[part]) if part in FP8_GOALS else reported(text, ratios[best], "x")


def _documents(name: str) -> int:
    words = name.partition(", ")[2].split()
    return int(words[0]) if words and words[0].isdigit() else 0


def _layers(each: Measurement) -> str:
    return f" ({each.figures['layers']} layers)" if "layers" in each.figures else ""


def _fp8_loss(known: Known, part: str) -> Iterator[Claim]:
    bf16 = known.figure(part, "bf16", "last")
    yield reported(f"{part}: loss in bf16 after the last steps", bf16 or math.nan, "nats")
    context = known.figure(part, "bf16", "of_loss_without_context") or math.nan
    yield at_most(f"{part}: loss in bf16 of the least that is possible without context", context, "x", CONTEXT_GOAL)
    recipes = [each for each in known.of(part) if each.name != "bf16"]
    for each in recipes:
        value = abs(each.figures["last"] - bf16) / bf16 if bf16 and not each.error else math.nan
        why = f": {each.error}" if each.error else ""
        yield at_most(f"{part}: difference of the loss in {each.name} from bf16{why}", value, "", FP8_LOSS_GOAL)
    if not recipes:
        yield at_most(f"{part}: difference of the loss from bf16: no recipe was measured", math.nan, "", FP8_LOSS_GOAL)


def _attention(known: Known, part: str) -> Iterator[Claim]:
    peaks: dict[str, list[float]] = {}
    for each in known.of(part):
        kind, first = each.name.partition(",")[0], each.name.partition(",")[0] not in peaks
        peaks.setdefault(kind, []).append(each.figures.get("peak_gb", math.nan))
        text = f"{part}: {each.name}: times as fast as a dense mask" + (f": {each.error}" if each.error else "")
        value = each.figures.get("times_as_fast", math.nan)
        goal = kind == "block-causal" and first
        yield at_least(text, value, "x", ATTENTION_GOAL) if goal else reported(text, value, "x")
        backend = each.figures.get("backend", "not measured")
        for figure in ("difference", "gradient_difference"):
            text = f"{part}: {each.name}: {figure.replace('_', ' ')} from it, by {backend}"
            yield at_most(text, each.figures.get(figure, math.nan), "", ATTENTION_APART_GOAL)
        for figure in ("seconds", "seconds_alone", "dense_seconds"):
            if figure in each.figures:
                yield reported(f"{part}: {each.name}: {figure.replace('_', ' ')}", each.figures[figure], "s")
    if "block-causal" not in peaks:
        text = f"{part}: block-causal: times as fast as a dense mask: not measured"
        yield at_least(text, math.nan, "x", ATTENTION_GOAL)
    for kind, (short, *more) in peaks.items():
        if not kind.startswith("["):  # the doubled pattern has one length
            value = more[0] / short if more else math.nan
            yield at_most(f"{part}: {kind}: peak memory at four times the positions", value, "x", LINEAR_GOAL)


def _loss(known: Known, part: str) -> Iterator[Claim]:
    cells = known.of(part)
    if not cells:
        yield at_most(
            f"{part}: peak memory against computing all logits: not measured", math.nan, "x", LOSS_MEMORY_GOAL
        )
    for each in cells:
        text = f"{part}: {each.name}: peak memory against computing all logits" + (
            f": {each.error}" if each.error else ""
        )
        value, fused = each.figures.get("memory", math.nan), "cross-entropy of" in each.name
        yield reported(text, value, "x") if fused else at_most(text, value, "x", LOSS_MEMORY_GOAL)
        apart = each.figures.get("difference", math.nan)
        yield at_most(f"{part}: {each.name}: difference of loss and gradients", apart, "", LOSS_APART_GOAL)
        for figure, unit in (("time", "x"), ("chunked_mib", "MiB"), ("all_logits_mib", "MiB")):
            if figure in each.figures:
                yield reported(f"{part}: {each.name}: {figure.replace('_', ' ')}", each.figures[figure], unit)


def _sampler(known: Known, part: str) -> Iterator[Claim]:
    passes: dict[tuple[str, str], float] = {}
    for each in known.of(part):
        batch, _, way = each.name.partition(", ")
        passes[batch, way] = each.figures.get("passes_per_second", math.nan)
        yield from _reported_of(each)
    for batch in dict.fromkeys(["batch 1", *(batch for batch, _ in passes)]):
        ratio = passes.get((batch, "with graphs"), math.nan) / passes.get((batch, "without graphs"), math.nan)
        text = f"{part}: {batch}: passes a second with CUDA graphs over without"
        if batch == "batch 1":
            yield at_least(text, ratio, "x", GRAPHS_GOAL)
            same = known.figure(part, f"{batch}, with graphs", "same_tokens")
            text = f"{part}: {batch}: tokens that are those of the same passes run from Python"
            yield at_least(text, math.nan if same is None else same, "of 1", 1.0)
        elif ratio == ratio:
            yield reported(text, ratio, "x")
        for way in (way for each, way in passes if each == batch and "FP8" in way):
            ratio = passes[batch, way] / passes.get((batch, "without graphs"), math.nan)
            yield reported(f"{part}: {batch}: passes a second, {way} over bf16", ratio, "x")


def _reported(known: Known, part: str) -> Iterator[Claim]:
    for each in known.of(part):
        yield from _reported_of(each)


def _reported_of(each: Measurement) -> Iterator[Claim]:
    if each.error:
        yield reported(f"{each.part}: {each.name}: {each.error}", math.nan, "")
    for figure, value in each.figures.items():
        if isinstance(value, int | float):
            yield reported(f"{each.part}: {each.name}: {figure.replace('_', ' ')}", value, "")


_CLAIMS: dict[str, Callable[[Known, str], Iterator[Claim]]] = {
    "reference": lambda known, part: iter(()),
    "exact-local": _agreement,
    "exact": _agreement,
    "dense": _steps,
    "llada-8b": _steps,
    "moe": _steps,
    "moe-rank": _steps,
    "mini": _steps,
    "fp8-loss": _fp8_loss,
    "attention": _attention,
    "loss": _loss,
    "sampler": _sampler,
}
