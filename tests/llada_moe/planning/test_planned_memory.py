"""What the planner says a rank holds: parameters of every family and layout, their bytes, and activations."""

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.model.parameters import count_parameters, rank_shares
from llada_megatron.llada_moe.planning.activations import in_flight, kept_of_layer
from llada_megatron.llada_moe.planning.held_parameters import Held, shard, stage_parameters, state_bytes
from llada_megatron.llada_moe.planning.memory import fullest, memory_by_stage
from llada_megatron.llada_moe.planning.traffic import context_bytes
from llada_megatron.llada_moe.planning.workload import Workload, of_run, stack_of, widths_of

MODELS = ("llada-8b", "llada-moe-7b-a1b", "llada2-mini", "llada2-flash", "small-dense", "small-moe", "tiny-moe-softmax")
LAYOUTS = (
    {},
    {"tensor_parallel": 2, "sequence_parallel": True},
    {"pipeline_parallel": 2},
    {"pipeline_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
    {"data_parallel": 4, "expert_parallel": 4},
    {"data_parallel": 2, "expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
    {"data_parallel": 2, "expert_tensor_parallel": 2},
)
RUN = load_run("llada-moe-7b-a1b-pretrain", ["layout.expert_parallel=8"])


def workload(model, layout):
    run = replace(load_run("llada-8b-pretrain"), model=load_model(model))
    return Workload(stack=stack_of(run), layout=layout, sequence=4096, micro_batch=1, micro_batches=8)


@pytest.mark.parametrize("keys", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_what_the_layout_gives_it(name, keys):
    """`rank_shares` itself is held against models on the meta device by tests/llada_moe/model/test_parameters.py."""
    model, layout = load_model(name), LayoutConfig(**keys)
    if (model.moe is None and "expert" in str(keys)) or model.num_layers % layout.pipeline_parallel:
        pytest.skip("the model has no such layout")
    made = workload(name, layout)
    for share in rank_shares(model, layout):
        held = stage_parameters(made, share.pipeline)
        assert held.dense + held.experts == share.parameters


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_the_published_number(name):
    held = stage_parameters(workload(name, LayoutConfig()), 0)
    assert held.dense + held.experts == count_parameters(load_model(name)).trainable


def test_experts_share_their_state_with_the_ranks_that_hold_the_same_ones():
    layout = LayoutConfig(data_parallel=64, expert_parallel=8)
    made = replace(of_run(RUN), layout=layout)
    held = Held(64 * 128 * 1000, 8 * 128 * 1000)
    assert state_bytes(made, held) == {
        "weights": 2 * (held.dense + held.experts),
        "gradients": 4 * (held.dense + held.experts),
        "main weights": 4 * (held.dense // 64 + held.experts // 8),
        "optimizer": 8 * (held.dense // 64 + held.experts // 8),
    }
    assert shard(129, 2) == 128 and shard(128, 2) == 64  # the buffer ends at a multiple of 128 elements


def test_context_ranks_share_the_state_too():
    made = of_run(replace(RUN, layout=LayoutConfig(context_parallel=8)))
    assert made.dense_copies == made.expert_copies == 8


def test_recomputation_keeps_less():
    def kept(recompute, *modules):
        return kept_of_layer(replace(of_run(RUN), recompute=recompute, modules=frozenset(modules)), 3)

    order = [kept("none"), kept("selective", "moe_act"), kept("selective", "moe"), kept("full")]
    assert order == sorted(order, reverse=True) and len(set(order)) == 4
    assert order[-1] == of_run(RUN).tokens * 2 * RUN.model.hidden_size  # the input of the layer, in bf16


def test_a_stage_holds_as_many_micro_batches_as_its_schedule_says():
    layout = LayoutConfig(pipeline_parallel=4)
    plain = replace(of_run(RUN), layout=layout, micro_batches=16)
    assert [in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(replace(plain, micro_batches=2), 0) == 2
    interleaved = replace(plain, layout=replace(layout, pipeline_chunks_per_rank=4))
    assert in_flight(interleaved, 0) == (2 * 3 + 3 * 4 + 1) / 4 and in_flight(interleaved, 3) == (3 * 4 + 1) / 4


def test_imbalance_costs_what_the_fullest_rank_holds():
    even, uneven = (fullest(memory_by_stage(of_run(RUN, imbalance))).parts for imbalance in (1.0, 2.0))
    assert uneven["activations"] > 1.3 * even["activations"]
    assert uneven["all-to-all"] == pytest.approx(1.5 * even["all-to-all"])  # what is received doubles, what is sent not
    assert uneven["weights"] == even["weights"]


def test_padded_rows_are_whole_for_each_expert():
    made = replace(of_run(RUN), padded_rows=True, sequence=100, micro_batch=1)
    assert made.rows_per_token(0) == 13 * 64 / 100  # 100 tokens x 8 of 64 experts are 12.5 rows each


def test_context_parallelism_keeps_the_keys_of_the_whole_sequence():
    made = replace(of_run(RUN), layout=LayoutConfig(context_parallel=2))
    elsewhere = replace(made, gathered_keys=False)
    more = kept_of_layer(made, 0) - kept_of_layer(elsewhere, 0)
    assert more == made.tokens * 2 * 2 * RUN.model.num_key_value_heads * RUN.model.head_dim


def test_weights_that_are_kept_in_fp8_take_about_a_byte():
    words = ["training.fp8.recipe=blockwise", "training.fp8.param_gather=true"]
    run = load_run("llada-8b-pretrain", words)
    tables = 2 * run.model.vocab_size * run.model.hidden_size / count_parameters(run.model).trainable
    assert widths_of(run).weight == widths_of(run).gathered == pytest.approx(1 + tables)
    left_out = widths_of(load_run("llada-8b-pretrain", [*words, "training.fp8.num_layers_at_end_in_bf16=16"]))
    assert left_out.weight == pytest.approx(1 + tables + (1 - tables) / 2)
    assert widths_of(load_run("llada-8b-pretrain", words[:1])).weight == 2.0


def test_a_key_head_is_never_cut():
    """Ranks that share one keep it whole: as many as there are ranks."""
    layout = LayoutConfig(tensor_parallel=8, sequence_parallel=True, context_parallel=2)
    made = replace(of_run(load_run("llada2-mini-pretrain")), layout=layout)
    more = replace(made, stack=replace(made.stack, key_heads=8))
    assert made.stack.key_heads == 4
    assert kept_of_layer(made, 0) == kept_of_layer(more, 0) and context_bytes(made, 0) == context_bytes(more, 0)
