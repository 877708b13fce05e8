"""Routing by blocks against its definition, block by block, on one rank and over ranks that cut blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.model.patterns import block_numbers, segments, whole_sequences
from llada_megatron.parallel import topology
from llada_megatron.tools.bench.layouts import MODELS
from tests.ranks import run_ranks

MODEL = MODELS["blocks"]
MOE = dataclasses.replace(MODEL.moe, num_experts=12, top_k=3, expert_capacity=5, expert_bias_update_rate=0.01)
SEQ, BATCH = 24, 3
SEGMENTS = torch.tensor([0, 7, 24, 48, 49, 60, 61, 72], dtype=torch.int32)
LAYOUTS = {
    "CP2": LayoutConfig(context_parallel=2),
    "TP2.SP": LayoutConfig(tensor_parallel=2, sequence_parallel=True),
    "TP2.SP.CP2": LayoutConfig(tensor_parallel=2, sequence_parallel=True, context_parallel=2),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


def make_router(moe, layout):
    from llada_megatron.llada_moe.model.routing import BlockRouter
    from llada_megatron.llada_moe.model.transformer import build_model
    from llada_megatron.parallel.build import transformer_config

    model = dataclasses.replace(MODEL, moe=moe, num_layers=2)
    built = build_model(model, transformer_config(model, layout))
    routers = [module for module in built.modules() if isinstance(module, BlockRouter)]
    assert [router.layer_number for router in routers] == [2]
    routers[0].expert_bias.copy_(torch.linspace(0.5, -0.5, moe.num_experts))
    return routers[0]


def drawn_logits() -> torch.Tensor:
    return torch.randn(SEQ, BATCH, MOE.num_experts, generator=torch.Generator().manual_seed(2))


def directly(logits, boundaries, moe, bias):
    """`[seq, batch, experts]` weights, from the definition."""
    weights = torch.zeros_like(logits)
    for part in segments(boundaries, logits.shape[0]):
        for start in range(part.start, part.stop, moe.routing_block_size):
            tokens = range(start, min(start + moe.routing_block_size, part.stop))
            ranked = {t: logits[t, part.row].sigmoid() + bias for t in tokens}
            best = [max(float(ranked[t][e]) for t in tokens) for e in range(moe.num_experts)]
            allowed = sorted(range(moe.num_experts), key=lambda e: -best[e])[: moe.expert_capacity]
            for t in tokens:
                chosen = sorted(allowed, key=lambda e: -float(ranked[t][e]))[: moe.top_k]
                scores = logits[t, part.row, chosen].sigmoid()
                weights[t, part.row, chosen] = scores / scores.sum() * moe.routed_scaling_factor
    return weights


@pytest.mark.parametrize("boundaries", [None, SEGMENTS], ids=["whole", "segments"])
def test_choice_and_weights_are_those_of_the_definition(one_rank, boundaries):
    router, logits = make_router(MOE, LayoutConfig()), drawn_logits()
    bias = router.expert_bias.clone()
    router.boundaries = boundaries
    weights, chosen = router.routing(logits)
    expected = directly(logits, whole_sequences(BATCH, SEQ) if boundaries is None else boundaries, MOE, bias)
    torch.testing.assert_close(weights.view_as(expected), expected)
    assert torch.equal(chosen, weights > 0) and (chosen.sum(1) == MOE.top_k).all()
    free = (logits.sigmoid() + bias).topk(MOE.top_k).indices
    assert not torch.equal(chosen, torch.zeros_like(logits).scatter_(2, free, 1).bool().flatten(0, 1))
    assert "expert_bias" in router.state_dict() and torch.equal(router.expert_bias, bias)
    assert torch.equal(router.local_tokens_per_expert, chosen.sum(0).float())


@torch.no_grad()
def test_a_document_is_routed_as_if_it_were_alone(one_rank):
    from llada_megatron.llada_moe.model.transformer import build_model
    from llada_megatron.parallel.build import transformer_config

    model = build_model(MODEL, transformer_config(MODEL, LayoutConfig())).eval()
    tokens = torch.randint(0, 120, (1, SEQ), generator=torch.Generator().manual_seed(4))
    packed = model(tokens, torch.tensor([0, 7, SEQ], dtype=torch.int32), rows=torch.ones_like(tokens, dtype=torch.bool))
    alone = [model(part, rows=torch.ones_like(part, dtype=torch.bool)) for part in tokens.split([7, SEQ - 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


def test_blocks_that_may_choose_every_expert_route_like_single_tokens(one_rank):
    every = dataclasses.replace(MOE, expert_capacity=MOE.num_experts)
    single = dataclasses.replace(MOE, routing_block_size=1)
    logits = drawn_logits()
    found = [make_router(moe, LayoutConfig()).routing(logits)[0] for moe in (every, single)]
    assert torch.equal(*found)


def test_gradients_are_those_of_the_weights(one_rank):
    router, logits = make_router(MOE, LayoutConfig()), drawn_logits().requires_grad_()
    pull = torch.randn(SEQ * BATCH, MOE.num_experts, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad((router.routing(logits)[0] * pull).sum(), logits)
    expected = directly(logits, whole_sequences(BATCH, SEQ), MOE, router.expert_bias)
    (wanted,) = torch.autograd.grad((expected.flatten(0, 1) * pull).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_the_blocks_of_a_batch_are_numbered_once_for_all_layers(one_rank, monkeypatch):
    from llada_megatron.llada_moe.model import routing
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.model.transformer import build_model
    from llada_megatron.parallel.build import transformer_config

    model, numbered, counts = dataclasses.replace(MODEL, moe=MOE, num_layers=3), [], []
    built, count = build_model(model, transformer_config(model, LayoutConfig())), routing.block_numbers
    assert sum(isinstance(module, routing.BlockRouter) for module in built.modules()) == 2
    monkeypatch.setattr(routing, "block_numbers", lambda *given: numbered.append(given) or count(*given))
    tokens, rows = torch.zeros(BATCH, SEQ, dtype=torch.int64), torch.ones(BATCH, SEQ, dtype=torch.bool)
    for boundaries, pattern in ((SEGMENTS, None), (SEGMENTS, None), (None, None), (SEGMENTS, 1), (SEGMENTS, None)):
        built.use_pattern(AttentionPattern(pattern))
        built(tokens, boundaries, rows=rows)
        counts.append(len(numbered))
    assert counts == [1, 1, 2, 3, 3]


CUT, WHOLE = (MOE, SEGMENTS), (dataclasses.replace(MOE, routing_block_size=3), torch.arange(0, 73, 12).int())
"""Blocks that ranks cut, and blocks that each lie on one rank."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_choose_as_one_process_and_say_nothing_where_blocks_are_whole(one_rank, name):
    layout = LAYOUTS[name]
    parts = sorted(run_ranks(routed_part, layout.world_size, layout), key=lambda part: part[0])
    for number, (moe, boundaries) in enumerate((CUT, WHOLE)):
        router = make_router(moe, LayoutConfig())
        router.boundaries = boundaries
        expected = router.routing(drawn_logits())[0].view(SEQ, BATCH, -1)
        assert torch.equal(torch.cat([torch.from_numpy(routed[number]) for _, routed, _ in parts]), expected)
    assert {messages for _, _, messages in parts} == {1}


def routed_part(layout: LayoutConfig):
    """The position of this rank's first token, its weights for cut and for whole blocks, and messages about maxima."""
    from megatron.core import parallel_state

    topology.initialize(layout, seed=1)
    context, tensor = parallel_state.get_context_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    count = SEQ // layout.world_size
    first = (context * layout.tensor_parallel + tensor) * count
    reduce, messages, found = torch.distributed.all_reduce, [], []
    torch.distributed.all_reduce = lambda *words, **keys: (messages.append(words), reduce(*words, **keys))[1]
    for moe, boundaries in (CUT, WHOLE):
        router = make_router(moe, layout)
        router.boundaries = boundaries
        weights, _ = router.routing(drawn_logits()[first : first + count])
        found.append(weights.detach().view(count, BATCH, -1).numpy())
    torch.distributed.all_reduce = reduce
    return first, found, len(messages)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 0),
    size=st.integers(1, 10),
)
def test_blocks_are_numbered_from_the_start_of_each_segment(lengths, size):
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    numbers, total = block_numbers(boundaries, size, torch.arange(sum(lengths)))
    expected = [(i, place // size) for i, length in enumerate(lengths) for place in range(length)]
    assert numbers.tolist() == [sorted(set(expected)).index(pair) for pair in expected]
    assert total == len(set(expected))
