"""Bytes that a rank sends in a step, by hand for small layouts."""

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.planning.held_parameters import Held, stage_parameters
from llada_megatron.llada_moe.planning.traffic import outside_share, traffic
from llada_megatron.llada_moe.planning.workload import of_run

RUN = load_run("llada-moe-7b-a1b-pretrain")
HIDDEN, LAYERS = RUN.model.hidden_size, RUN.model.num_layers


def sent(layout, **changes):
    made = replace(of_run(RUN), layout=LayoutConfig(**layout), micro_batches=3, micro_batch=1, **changes)
    held = [stage_parameters(made, stage) for stage in range(made.layout.pipeline_parallel)]
    return {each.axis: each.sent for each in traffic(made, held, 8)}, made


def test_one_rank_sends_nothing():
    assert sent({}) == ({}, sent({})[1])


def test_tensor_parallel_attention_gathers_and_scatters():
    two, made = sent({"tensor_parallel": 2, "sequence_parallel": True})
    four, _ = sent({"tensor_parallel": 4, "sequence_parallel": True})
    assert four["tensor"] == pytest.approx(two["tensor"] * 3 / 4 * 2)
    blocks = LAYERS * 5 * 3 * 2 * made.tokens * HIDDEN / 2  # the experts are not cut
    assert blocks < two["tensor"] < 1.2 * blocks  # and the embedding, the output layer, the norms


def test_pipeline_chunks_send_more_often():
    plain, made = sent({"pipeline_parallel": 2})
    assert plain["pipeline"] == 3 * 2 * made.tokens * HIDDEN  # forwards from the first, backwards from the last
    chunks, _ = sent({"pipeline_parallel": 2, "pipeline_chunks_per_rank": 2})
    assert chunks["pipeline"] == 3 * plain["pipeline"]


def test_experts_send_there_and_back():
    found, made = sent({"data_parallel": 4, "expert_parallel": 4})
    rows = made.tokens * RUN.model.moe.top_k
    assert found["expert"] == LAYERS * 3 * rows * (4 * 2 * HIDDEN + 2 * 4) * 3 / 4
    again, _ = sent({"data_parallel": 4, "expert_parallel": 4}, modules=frozenset({"moe"}), recompute="selective")
    assert again["expert"] == 1.5 * found["expert"]


def test_data_parallel_ranks_reduce_and_gather_what_they_share():
    found, made = sent({"data_parallel": 4, "expert_parallel": 2})
    held = stage_parameters(made, 0)
    assert found["data"] == pytest.approx(6 * held.dense * 3 / 4, rel=1e-5)  # padded
    assert found["expert data"] == 6 * held.experts / 2
    assert isinstance(held, Held)


@pytest.mark.parametrize(
    ("ranks", "stride", "axis", "share"),
    [(8, 1, "tensor", 0.0), (16, 1, "expert", 8 / 15), (16, 1, "data", 1 / 8), (4, 8, "pipeline", 1.0)],
)
def test_what_leaves_a_node(ranks, stride, axis, share):
    assert outside_share(ranks, stride, 8, axis) == pytest.approx(share)
