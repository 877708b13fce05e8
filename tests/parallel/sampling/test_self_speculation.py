"""Self-speculation on real models: in every layout it writes what a full causal pass for each token gives."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.patterns import CAUSAL, whole_sequences
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Recompute
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation, Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel.sampling.prompts import Gap, Prompt
from llada_megatron.parallel.sampling.requests import RequestBuilder
from tests.parallel.sampling.spread import GRID, MASK, MODELS, Case, load, write_on_ranks
from tests.ranks import run_ranks
from tests.seeds import drawn

FEW = LogitsProcessor(excluded=range(4, 128))
"""Four tokens to choose among: an untrained model's drafts are right now and then."""
SPECULATION = Method(SelfSpeculation(draft_length=6), BlockCausalCache(prefill=8), logits_processor=FEW)
LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "TP2.EP2": {"tensor_parallel": 2, "expert_parallel": 2},
    "EP2": {"data_parallel": 2, "expert_parallel": 2},
}


@functools.cache
def requests():
    """Texts of very different lengths, other ones each time."""
    draw = torch.Generator().manual_seed(drawn().randrange(2**32))
    lengths = torch.randint(1, 24, (6, 2), generator=draw).tolist()
    return [
        continuation(torch.randint(0, 120, (given,), generator=draw).tolist(), 4 + new, None, stream)
        for stream, (given, new) in enumerate(lengths)
    ]


@functools.cache
def decoded(model: str) -> dict[int, list[int]]:
    """By streams, each token from a causal pass over all before it; without texts in which rounding could choose."""
    return run_ranks(decode, 1, model, requests())[0]


def decode(model, texts):
    from llada_megatron.parallel import topology

    topology.initialize(LayoutConfig(), 0)
    loaded = load(MODELS[model], LayoutConfig(), None, causal=True)
    found = {}
    for text in texts:
        tokens, near = list(text.tokens[: text.gaps.index(True)]), False
        while len(tokens) < text.length:
            rows = torch.zeros(1, len(tokens), dtype=torch.bool)
            rows[0, -1] = True
            logits = loaded.logits(torch.tensor([tokens]), rows, whole_sequences(1, len(tokens)))[0]
            logits[list(FEW.excluded)] = -torch.inf
            best = logits.topk(2)
            near = near or float(best.values.diff().abs()) < 1e-4
            tokens.append(int(best.indices[0]))
        if not near:
            found[text.stream] = tokens
    assert len(found) > 3
    return found


def cases(model: str) -> list[Case]:
    """Drafts of a block, and none."""
    schedules = (SelfSpeculation(6), SelfSpeculation(0))
    return [Case(model, dataclasses.replace(SPECULATION, schedule=each), requests()) for each in schedules]


@pytest.mark.parametrize("layout", ["one process", *LAYOUTS])
def test_tokens_are_those_of_greedy_decoding(layout):
    sizes = LAYOUTS.get(layout, {})
    models = ["experts"] if "expert_parallel" in sizes else ["dense", "experts"]
    each = [case for model in models for case in cases(model)]
    passes = []
    for case, (finished, _) in zip(each, write_on_ranks(each, LayoutConfig(**sizes)), strict=True):
        tokens = {stream: one.tokens for stream, one in finished.items()}
        assert len(tokens) == 6 and decoded(case.model).items() <= tokens.items()
        passes.append(sum(one.passes for one in finished.values()))
    assert passes[0] < passes[1]  # drafts are accepted


@pytest.mark.parametrize(
    ("pieces", "message"),
    [(((5, 6), Gap(3), (7,)), "does not see what stands behind a gap"), (((),), "prompt 1 .*: it is empty")],
    ids=["gap", "empty"],
)
def test_prompts_that_cannot_be_continued_are_refused(pieces, message):
    builder = RequestBuilder(MODELS["dense"], None, 8, None, None, continues_only=True)
    with pytest.raises(ConfigError, match=message):
        builder.build(Prompt(pieces))
    assert builder.build(Prompt(((5, 6),))).blocks == [(2, 10)]


def both_ways(model):
    """Largest relative difference of the logits of every pass of diffusion behind a causal text, with kept keys and
    with everything computed anew; and of a draft's from those of training, `[x_t ; x_0]`."""
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.sampling.loop import SequenceGroup
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.stage import StageRunner

    topology.initialize(LayoutConfig(), 0)
    stage = load(MODELS[model], LayoutConfig(), None, causal=True).model
    methods = [
        Method(Threshold(0.5), cache, logits_processor=FEW, grid=GRID, causal_text=True)
        for cache in (BlockCausalCache(), Recompute())
    ]
    text = continuation(list(range(20, 31)), 14, None, 0, GRID)
    groups, runners = [], []
    for method in methods:
        groups.append(SequenceGroup(method, 1, 64, 8, MASK))
        runners.append(StageRunner(stage, method, 1, 64))
        groups[-1].admit(0, text)
    apart = []
    while (works := [group.plan() for group in groups])[0] is not None:
        stage.use_pattern(CAUSAL)
        outputs = [runner.forward(work) for runner, work in zip(runners, works, strict=True)]
        apart.append((outputs[0] - outputs[1]).abs().max())
        tokens, end = works[1].tokens, len(works[1].tokens)
        clean = tokens.masked_fill(tokens == MASK, 0)  # behind what a draft sees
        rows = torch.cat([works[1].output_mask, torch.zeros(end, dtype=torch.bool)])[None]
        stage.use_pattern(AttentionPattern(GRID, doubled=True, causal_clean=True))
        with torch.no_grad():
            trained = stage(torch.cat([tokens, clean])[None], None, rows=rows)
        apart.append((outputs[1] - trained).abs().max())
        for group, runner, work, output in zip(groups, runners, works, outputs, strict=True):
            group.apply(runner.read(work, output))
    return float(torch.stack(apart).max()), len(apart)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_blocks_behind_a_causal_text_see_what_they_saw_in_training(model):
    error, count = run_ranks(both_ways, 1, model)[0]
    assert error < 1e-4 and count >= 4  # two passes or more, each compared twice
