"""Layouts of a run on a number of GPUs, and the changes by which a run that does not fit would."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import get_args

from llada_megatron.llada_moe.config.fp8 import check_fp8
from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout, divisors
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import RecomputedModule, TrainingConfig, check_batch
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.planning.estimate import GIB, Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet
from llada_megatron.llada_moe.planning.workload import own_experts

MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4, 8)
MOST_CONTEXT = 8
LARGEST_CLUSTER = 65536


@dataclass(frozen=True)
class Found:
    """The layouts of a search: those that fit, the fastest first, and why others are out."""

    ranked: list[Estimate]
    too_large: list[Estimate]
    """They do not fit; the smallest first."""
    refused: Counter[str] = field(default_factory=Counter)
    """What cannot be laid out, by the key that forbids it."""

    @property
    def examined(self) -> int:
        """Layouts that were estimated."""
        return len(self.ranked) + len(self.too_large)


def search(run: RunConfig, gpus: int, gpu: GpuSheet, assumed: Assumptions) -> Found:
    """Every layout of `gpus` GPUs under which the run is the same mathematics: its batch and sequences stay."""
    refused: Counter[str] = Counter()
    estimates = [Estimate(each, gpu, assumed) for each in candidates(run, gpus, gpu.gpus_per_node, refused)]
    ranked = sorted((each for each in estimates if each.fits), key=lambda each: each.time.total)
    too_large = sorted((each for each in estimates if not each.fits), key=lambda each: each.card_bytes)
    return Found(ranked, too_large, refused)


def candidates(run: RunConfig, gpus: int, near: int, refused: Counter[str] | None = None) -> Iterator[RunConfig]:
    """The run under each layout, micro-batch and recomputation that its checks allow. Tensor ranks stay in a node."""
    refused = Counter() if refused is None else refused
    for layout in _layouts(run, gpus, near):
        if not _allowed(run, layout, refused):
            continue
        for micro in MICRO_BATCHES:
            for recompute, modules in recomputations(run):
                training = replace(
                    run.training, micro_batch_size=micro, recompute=recompute, recompute_modules=list(modules)
                )
                if _batch_allowed(training, run, layout, refused):
                    yield replace(run, layout=layout, training=training)


def recomputations(run: RunConfig) -> list[tuple[str, tuple[str, ...]]]:
    """From the fastest to the smallest."""
    of_experts = "moe" if own_experts(run) else "moe_act"  # ours never keep their activation
    modules = (of_experts,) if run.model.moe else ("mlp",)
    return [("none", ()), ("selective", modules), ("full", ())]


def every_recomputation(run: RunConfig) -> list[tuple[str, tuple[str, ...]]]:
    """None, each module that the model has alone, and all of a layer."""
    found: list[tuple[str, tuple[str, ...]]] = [("none", ())]
    for module in get_args(RecomputedModule):
        training = replace(run.training, recompute="selective", recompute_modules=[module])
        if _batch_allowed(training, run, run.layout, Counter()):
            found.append(("selective", (module,)))
    return [*found, ("full", ())]


def _layouts(run: RunConfig, gpus: int, near: int) -> Iterator[LayoutConfig]:
    model = run.model
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    for tensor in (size for size in divisors(gpus) if size <= near):
        for pipeline in (size for size in divisors(gpus // tensor) if size <= model.num_layers):
            for context in (size for size in divisors(gpus // tensor // pipeline) if size <= MOST_CONTEXT):
                data = gpus // tensor // pipeline // context
                for expert in experts:
                    for chunks in CHUNKS if pipeline > 1 else CHUNKS[:1]:
                        yield replace(
                            run.layout,
                            tensor_parallel=tensor,
                            sequence_parallel=tensor > 1,
                            pipeline_parallel=pipeline,
                            pipeline_chunks_per_rank=chunks,
                            pipeline_layers=None,
                            context_parallel=context,
                            data_parallel=data,
                            expert_parallel=expert,
                            expert_tensor_parallel=1,
                        )


def _allowed(run: RunConfig, layout: LayoutConfig, refused: Counter[str]) -> bool:
    problems: list[str] = []
    check_layout(run.model, layout, lambda key, reason: problems.append(key))
    refused.update(problems[:1])
    return not problems


def _batch_allowed(training: TrainingConfig, run: RunConfig, layout: LayoutConfig, refused: Counter[str]) -> bool:
    problems: list[str] = []
    check_batch(training, run.model, layout, lambda key, reason: problems.append(key))
    if not problems:
        check_fp8(training, run.model, layout, lambda key, reason: problems.append(key))
    refused.update(problems[:1])
    return not problems


def spread_over(run: RunConfig, gpus: int) -> RunConfig:
    """The run on `gpus` GPUs: its layout with as many data-parallel ranks as these give.

    Raises:
        ConfigError: the layout does not divide them; says which numbers it does divide.
    """
    layout = run.layout
    if gpus == layout.world_size:
        return run
    cell = layout.world_size // layout.data_parallel
    if gpus % cell == 0:
        wider = replace(layout, data_parallel=gpus // cell)
        problems: list[str] = []

        def note(key: str, reason: str) -> None:
            problems.append(f"{key}: {reason}")

        check_layout(run.model, wider, note)
        check_batch(run.training, run.model, wider, note)
        if not problems:
            return replace(run, layout=wider)
        raise ConfigError(f"--gpus {gpus}: with layout.data_parallel {wider.data_parallel}, {problems[0]}")
    near = sorted({max(1, gpus // cell) * cell, math.ceil(gpus / cell) * cell})
    raise ConfigError(
        f"--gpus {gpus}: the layout takes a multiple of {cell} GPUs (tensor {layout.tensor_parallel} x pipeline "
        f"{layout.pipeline_parallel} x context {layout.context_parallel}); use {' or '.join(map(str, near))}, or "
        "--search for layouts of any number"
    )


def smallest_change(estimate: Estimate) -> str | None:
    """The first change of one or two keys by which a run that does not fit would, as overrides; None = none does.

    They are tried in the order of what they cost: run again what is cheap, smaller micro-batches, run all again, spread
    the model further over the same GPUs.
    """
    for overrides, changed in _changes(estimate.run, estimate.gpu.gpus_per_node):
        other = replace(estimate, run=changed, counted=None)
        if other.fits:
            return f"{overrides} (then {other.card_bytes / GIB:.1f} GiB)"
    return None


def _changes(run: RunConfig, near: int) -> Iterator[tuple[str, RunConfig]]:
    yield from _changes_of_training(run)
    for each in candidates(run, run.layout.world_size, near):
        if each.layout.context_parallel == run.layout.context_parallel:
            yield _layout_words(each, run), each


def _changes_of_training(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    training = run.training
    options = [(training.recompute, tuple(training.recompute_modules)), *recomputations(run)[1:]]
    micros = [size for size in divisors(training.micro_batch_size)[::-1]]
    for recompute, modules in dict.fromkeys(options):
        for micro in micros:
            changed = replace(training, micro_batch_size=micro, recompute=recompute, recompute_modules=list(modules))
            words = [f"training.micro_batch_size={micro}"] * (micro != training.micro_batch_size)
            if recompute != training.recompute or list(modules) != training.recompute_modules:
                words.append(f"training.recompute={recompute}")
                words += [f"training.recompute_modules=[{','.join(modules)}]"]
            if words and _batch_allowed(changed, run, run.layout, Counter()):
                yield " ".join(words), replace(run, training=changed)


def _layout_words(run: RunConfig, before: RunConfig) -> str:
    layout, training = run.layout, run.training
    words = [
        f"layout.{key}={getattr(layout, key)}".lower()
        for key in (
            "tensor_parallel",
            "sequence_parallel",
            "pipeline_parallel",
            "pipeline_chunks_per_rank",
            "context_parallel",
            "data_parallel",
            "expert_parallel",
        )
    ]
    words += taken_back(before)
    words.append(f"training.micro_batch_size={training.micro_batch_size} training.recompute={training.recompute}")
    return " ".join([*words, f"training.recompute_modules=[{','.join(training.recompute_modules)}]"])


def taken_back(run: RunConfig) -> list[str]:
    """Keys of the run's layout that no layout of a search has, as overrides."""
    layout = run.layout
    words = ["layout.pipeline_layers=null"] * (layout.pipeline_layers is not None)
    return words + ["layout.expert_tensor_parallel=1"] * (layout.expert_tensor_parallel > 1)


def more_gpus(estimate: Estimate) -> str:
    """How many GPUs a run that does not fit would need at least, as more data-parallel ranks of its layout."""
    cell = estimate.run.layout.world_size // estimate.run.layout.data_parallel
    found = _fewest_replicas(estimate)
    if found is None:
        return (
            f"no number of {estimate.gpu.name} as more data-parallel ranks fits either; `llada plan --search` tries "
            "other layouts on 2, 4, 8, … times as many GPUs"
        )
    data, changes = found
    return (
        f"the fewest GPUs that would do in this layout are {cell * data}: "
        f"{' '.join([f'layout.data_parallel={data}', *changes.split()])}"
    )


def _fewest_replicas(estimate: Estimate) -> tuple[int, str] | None:
    """The fewest data-parallel ranks, more than the run has, with which it or a change of its training fits."""
    run = estimate.run
    cell = run.layout.world_size // run.layout.data_parallel
    for data in divisors(run.training.global_batch_size):
        if data <= run.layout.data_parallel or cell * data > LARGEST_CLUSTER:
            continue
        wider = replace(run, layout=replace(run.layout, data_parallel=data))
        if not _allowed(run, wider.layout, Counter()):
            continue
        changes = [("", wider)] * _batch_allowed(run.training, run, wider.layout, Counter())
        for words, changed in (*changes, *_changes_of_training(wider)):
            if replace(estimate, run=changed, counted=None).fits:
                return data, words
    return None


def fewest_gpus(run: RunConfig, gpu: GpuSheet, assumed: Assumptions, more_than: int) -> int | None:
    """The fewest GPUs, of `more_than` times powers of two, on which some layout of the run fits."""
    gpus = 2 * more_than
    while gpus <= LARGEST_CLUSTER:
        if any(Estimate(each, gpu, assumed).fits for each in candidates(run, gpus, gpu.gpus_per_node)):
            return gpus
        gpus *= 2
    return None
