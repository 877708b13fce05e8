"""Edits of what was written leave the cache of a block-causal model exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Cache, Recompute
from llada_megatron.llada_moe.sampling.editors import Editor, Levenshtein, TokenEditing, WideIn, Wino
from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup
from llada_megatron.llada_moe.sampling.schedules import Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import Request
from tests.parallel.sampling.spread import GRID, MASK, MODELS, load, requests
from tests.ranks import run_ranks

ROUTED = MODELS["routed by blocks"]
ARCHITECTURES = {
    "dense": MODELS["dense"],
    "experts": MODELS["experts"],
    "routed by blocks": dataclasses.replace(ROUTED, moe=dataclasses.replace(ROUTED.moe, routing_block_size=GRID // 2)),
}
EDITORS = {
    "token editing": TokenEditing(0.0, 3),
    "two blocks": TokenEditing(0.0, 2, reach=1),
    "three blocks": TokenEditing(0.0, 2, reach=2),
    "wino": Wino(0.5),
    "levenshtein": Levenshtein(0.0, 4, 6, 7),
}


@pytest.mark.parametrize(
    ("model", "editor"),
    [("dense", name) for name in EDITORS]
    + [("experts", "two blocks"), ("routed by blocks", "wino"), ("routed by blocks", "two blocks")],
)
def test_logits_and_tokens_are_those_of_a_full_recomputation(model, editor):
    error, edits, results = run_ranks(compare, 1, model, EDITORS[editor], requests(4, GRID))[0]
    assert error <= 1e-5
    assert edits > 0
    assert results[0] == results[1] and len(results[0]) == 4


def compare(model: str, editor: Editor, texts: list[Request]) -> tuple[float, int, list[list[tuple[int, list[int]]]]]:
    """On a rank: largest relative error of the logits, changes of written tokens, and the results of either cache."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.stage import StageRunner

    topology.initialize(LayoutConfig(), 0)
    stage = load(ARCHITECTURES[model], LayoutConfig(), GRID).model
    methods = [_method(editor, cache) for cache in (BlockCausalCache(), Recompute())]
    groups = [SequenceGroup(method, len(texts), 64, 8, MASK) for method in methods]
    runners = [StageRunner(stage, method, len(texts), 64) for method in methods]
    for group in groups:
        for slot, request in enumerate(texts):
            group.admit(slot, request)
    apart, edits, results = [], 0, [[], []]
    while (works := [group.plan() for group in groups])[0] is not None:
        outputs = [runner.forward(work) for runner, work in zip(runners, works, strict=True)]
        apart.append((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
        for group, runner, work, output, result in zip(groups, runners, works, outputs, results, strict=True):
            step = group.apply(runner.read(work, output))
            edits += int((step.changed & step.block.editable).sum())
            result += [(done.stream, done.tokens) for done in step.finished]
    return float(torch.stack(apart).max()), edits, results  # NaN if one is


def _method(editor: Editor, cache: Cache) -> Method:
    schedule = WideIn(0.1, least=2, most=4) if isinstance(editor, Wino) else Threshold(0.2)
    processor = LogitsProcessor(frozenset(editor.needs), [MASK], editor.operations)
    return Method(schedule, cache, editor, processor, grid=GRID)
