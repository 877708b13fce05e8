"""Combinations that cannot work are refused with the arithmetic, and those that can are let through."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import from_dict, load_model, load_run, to_dict, validate_run
from llada_megatron.llada_moe.config.layout import LayoutConfig, data_parallel_for_experts
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError

RUN = """\
model: {model}
training:
  steps: 100
  sequence_length: 64
  global_batch_size: 8
data:
  sets:
    - path: data/a
optimizer:
  learning_rate:
    peak: 1e-3
output_dir: runs/x
"""
TP_WITHOUT_SP = "a MoE model with tensor_parallel 2 trains only with sequence_parallel: true"


def run_file(folder: Path, model: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(RUN.format(model=model), encoding="utf-8")
    return path


REFUSED = {
    "recovery window": ("tiny-dense", "recovery.spike_window=7", "7 losses have no steady deviation; use 8 or more"),
    "recovery decisions": (
        "tiny-dense",
        "recovery.max_decisions=0",
        "recovery.max_decisions: 0 must be greater than 0",
    ),
    "recovery rate": ("tiny-dense", "recovery.learning_rate_factor=1.5", "1.5 must be greater than 0 and at most 1"),
    "recovery hang": ("tiny-dense", "recovery.hang_factor=1", "1.0 must be greater than 1"),
    "recovery in vain": (
        "tiny-dense recovery.not_finite=rollback",
        "recovery.skip_steps=0",
        "0 with learning_rate_factor 1 goes back and then runs the same steps again",
    ),
    "tensor heads": (
        "llada-moe-7b-a1b",
        "layout.tensor_parallel=3",
        "3 does not divide num_attention_heads 16; use one of 1, 2, 4, 8, 16",
    ),
    "tensor key heads": (
        "tiny-dense model.num_key_value_heads=4 model.num_attention_heads=12 "
        "model.vocab_size=252 model.ffn_hidden_size=96",
        "layout.tensor_parallel=6",
        "6 neither divides num_key_value_heads 4 nor is a multiple of it; use one of 1, 2, 4",
    ),
    "tensor vocabulary": (
        "tiny-dense model.vocab_size=255",
        "layout.tensor_parallel=2",
        "2 does not divide vocab_size 255; use one of 1",
    ),
    "tensor ffn": (
        "tiny-dense model.ffn_hidden_size=130",
        "layout.tensor_parallel=4",
        "4 does not divide ffn_hidden_size 130; use one of 1, 2",
    ),
    "tensor shared": (
        "tiny-moe model.moe.shared_expert_ffn_hidden_size=34",
        "layout.tensor_parallel=4",
        "does not divide moe.shared_expert_ffn",
    ),
    "sequence without tensor": ("tiny-dense", "layout.sequence_parallel=true", "true needs tensor_parallel > 1"),
    "sequence length": (
        "tiny-dense training.sequence_length=62 layout.tensor_parallel=4",
        "layout.sequence_parallel=true",
        "sequence_length 62 / context_parallel 1 = 62 is not a multiple of tensor_parallel 4",
    ),
    "moe needs sequence": ("tiny-moe layout.tensor_parallel=2", "layout.sequence_parallel=false", TP_WITHOUT_SP),
    "expert": (
        "tiny-moe layout.data_parallel=3",
        "layout.expert_parallel=3",
        "3 does not divide num_experts 8; use one of 1, 2, 4, 8",
    ),
    "expert ranks": (
        "tiny-moe layout.data_parallel=2",
        "layout.expert_parallel=4",
        "tensor 1 x context 1 x data 2 = 2",
    ),
    "expert without moe": (
        "tiny-dense layout.data_parallel=2",
        "layout.expert_parallel=2",
        "2, but the model has no experts; use 1",
    ),
    "expert tensor": (
        "tiny-moe model.moe.expert_ffn_hidden_size=33 layout.data_parallel=2",
        "layout.expert_tensor_parallel=2",
        "2 does not divide expert_ffn_hidden_size 33",
    ),
    "pipeline": ("tiny-dense", "layout.pipeline_parallel=3", "3 does not divide num_layers 4; use one of 1, 2, 4"),
    "chunks": (
        "tiny-dense layout.pipeline_parallel=2",
        "layout.pipeline_chunks_per_rank=3",
        "2 x 3 chunks = 6 does not divide num_layers 4; use one of 1, 2",
    ),
    "uneven alone": ("tiny-dense", "layout.pipeline_layers=[4]", "[4] needs pipeline_parallel > 1"),
    "uneven count": (
        "tiny-dense layout.pipeline_parallel=2",
        "layout.pipeline_layers=[1,2,1]",
        "[1, 2, 1] has 3 numbers, but pipeline_parallel 2 x pipeline_chunks_per_rank 1 = 2",
    ),
    "uneven sum": (
        "tiny-dense layout.pipeline_parallel=2",
        "layout.pipeline_layers=[3,2]",
        "[3, 2] are 5 layers, but num_layers is 4",
    ),
    "uneven empty": (
        "tiny-dense layout.pipeline_parallel=2",
        "layout.pipeline_layers=[4,0]",
        "[4, 0]: every stage holds at least 1 layer",
    ),
    "shared overlap": (
        "tiny-moe-softmax",
        "layout.overlap_shared_experts=true",
        "true, but the model has no shared expert",
    ),
    "shared overlap of others": (
        "tiny-moe layout.expert_dispatcher=allgather",
        "layout.overlap_shared_experts=true",
        "works with expert_dispatcher alltoall only, not with allgather",
    ),
    "gather alone": ("tiny-dense", "layout.overlap_param_gather=true", "true needs overlap_grad_reduce: true"),
    "flex alone": ("tiny-moe", "layout.expert_dispatcher=flex", "tensor_parallel x expert_parallel is 1"),
    "recompute nothing": ("tiny-moe", "training.recompute=selective", "selective needs the modules in"),
    "recompute unnamed": ("tiny-moe", "training.recompute_modules=[moe]", "moe needs recompute: selective"),
    **{
        f"recompute {name}": (f"{run} training.recompute=selective", f"training.recompute_modules={modules}", message)
        for name, run, modules, message in (
            ("twice", "tiny-moe", "[moe,moe]", "moe: named twice"),
            ("dense", "tiny-dense", "[moe_act]", "moe_act: the model has no experts"),
            ("mlp", "tiny-moe-softmax", "[mlp]", "mlp: every layer of the model is MoE"),
            ("inside", "tiny-moe", "[moe,moe_act]", "moe_act: moe runs it again already"),
            ("shared", "tiny-moe-softmax", "[shared_experts]", "shared_experts: the model has no shared expert"),
            (
                "overlapped",
                "tiny-moe layout.overlap_shared_experts=true",
                "[shared_experts]",
                "does not go together with layout.overlap_shared_experts",
            ),
            (
                "blocks",
                "llada2.2-mini training.sequence_length=64 layout.pipeline_parallel=2",
                "[moe]",
                "moe: with model.moe.expert_capacity and pipeline stages",
            ),
        )
    },
    "chunks alone": ("tiny-dense", "layout.pipeline_chunks_per_rank=2", "2 needs pipeline_parallel > 1"),
    "chunks micro-batches": (
        "tiny-dense layout.pipeline_parallel=2 layout.pipeline_chunks_per_rank=2",
        "training.global_batch_size=7",
        "global_batch_size 7 / 1 = 7 micro-batches, not a multiple of pipeline_parallel 2",
    ),
    "context": ("tiny-dense", "layout.context_parallel=3", "3 does not divide sequence_length 64"),
    "zero axis": ("tiny-dense", "layout.data_parallel=0", "0 must be at least 1"),
    "batch": (
        "tiny-dense layout.data_parallel=2 training.micro_batch_size=4",
        "training.global_batch_size=12",
        "12 is not a multiple of micro_batch_size 4 x data_parallel 2 = 8; use 8 or 16, or training.micro_batch_size=2",
    ),
    "length": ("tiny-dense", "training.sequence_length=256", "256 is longer than the model's max_sequence_length 128"),
    "steps": ("tiny-dense", "training.steps=0", "0 must be at least 1"),
    "seed": ("tiny-dense", "training.seed=-1", "-1 must lie between 0 and 4294967295"),
    "dense family": ("tiny-dense", "model.family=llada2", "llada2 cannot hold a dense model"),
    "moe family": ("tiny-moe", "model.family=llada", "llada cannot hold a MoE model"),
    "dense qwen3": ("tiny-moe", "model.family=qwen3", "use llada_moe or llada2 or qwen3_moe"),
    "qwen3 without experts": ("tiny-dense", "model.family=qwen3_moe", "a dense model (no published checkpoint does)"),
    "normalized one": (
        "tiny-moe-softmax model.moe.score_function=softmax_normalized",
        "model.moe.top_k=1",
        "1 with score_function softmax_normalized gives every weight 1",
    ),
    "normalized groups": (
        "tiny-moe-softmax model.moe.score_function=softmax_normalized",
        "model.moe.num_expert_groups=2",
        "2 with score_function softmax_normalized",
    ),
    "top k": ("tiny-moe", "model.moe.top_k=12", "12 experts per token, but there are only 8"),
    "groups": ("tiny-moe", "model.moe.num_expert_groups=3", "3 does not divide num_experts 8"),
    "groups kept": ("tiny-moe", "model.moe.expert_groups_top_k=5", "5 groups kept, but there are only 4"),
    "groups share": ("tiny-moe", "model.moe.expert_groups_top_k=3", "3 does not divide top_k 4"),
    "groups hold": (
        "tiny-moe model.moe.expert_groups_top_k=1",
        "model.moe.top_k=4",
        "4 experts per token, but 1 groups of 2 hold only 2",
    ),
    "capacity below": (
        "tiny-moe",
        "model.moe.expert_capacity=3",
        "3 experts for a block, but each of its tokens takes",
    ),
    "capacity above": ("tiny-moe", "model.moe.expert_capacity=9", "9 experts for a block, but there are only 8"),
    "capacity negative": ("tiny-moe", "model.moe.expert_capacity=-1", "-1 must not be negative"),
    "capacity of softmax": (
        "tiny-moe-softmax",
        "model.moe.expert_capacity=4",
        "needs score_function sigmoid and expert",
    ),
    "capacity without bias": (
        "tiny-moe model.moe.expert_bias=false",
        "model.moe.expert_capacity=4",
        "needs score_function sigmoid and expert_bias: true",
    ),
    "capacity and groups": (
        "tiny-moe model.moe.expert_capacity=4",
        "model.moe.num_expert_groups=4",
        "4 with expert_capacity 4: experts are limited by block or by group, not by both; use 1",
    ),
    "routing block": ("tiny-moe", "model.moe.routing_block_size=0", "0 must be greater than 0"),
    "routing of the past": (
        "llada2.2-mini training.sequence_length=64",
        "objective.kind=autoregressive",
        "autoregressive with model.moe.expert_capacity 48: the experts of a token would depend on the tokens after it",
    ),
    "routing beyond": (
        "llada2.2-mini",
        "objective.block_size=80",
        "80 is not a multiple of model.moe.routing_block_size 32: tokens would be routed by tokens of the next block, "
        "which they do not see; use 64",
    ),
    "no moe layer": ("tiny-moe", "model.moe.leading_dense_layers=4", "4 of 4 layers leaves no MoE layer"),
    "bias of softmax": (
        "tiny-moe model.moe.score_function=softmax",
        "model.moe.expert_bias=true",
        "needs score_function sigmoid",
    ),
    "bias update": (
        "tiny-moe model.moe.expert_bias=false",
        "model.moe.expert_bias_update_rate=1e-3",
        "updates a bias that is not there",
    ),
    "negative loss": ("tiny-moe", "model.moe.aux_loss_coefficient=-1", "-1.0 must not be negative"),
    "heads": ("tiny-dense", "model.num_key_value_heads=3", "3 does not divide num_attention_heads 4"),
    "no heads": ("tiny-dense", "model.num_key_value_heads=0", "0 must be greater than 0"),
    "rotary": (
        "tiny-dense",
        "model.rotary_fraction=0.3",
        "head_dim 16 x rotary_fraction 0.3 = 4.8 must be an even number",
    ),
    "mask id": ("tiny-dense", "model.mask_token_id=256", "256 is outside the vocabulary of 256 (0 to 255)"),
    "mask is eos": ("tiny-dense", "model.mask_token_id=2", "2 is also eos_token_id"),
    "half an editor": (
        "tiny-dense model.delete_token_id=9",
        "model.insert_token_id=null",
        "delete_token_id and insert_token_id, or neither; give both",
    ),
    "insert outside": (
        "tiny-dense model.delete_token_id=9",
        "model.insert_token_id=256",
        "256 is outside the vocabulary of 256 (0 to 255)",
    ),
    "insert is delete": (
        "tiny-dense model.delete_token_id=9",
        "model.insert_token_id=9",
        "9 is also delete_token_id",
    ),
    "delete is eos": ("tiny-dense model.insert_token_id=9", "model.delete_token_id=2", "2 is also eos_token_id"),
    "band": (
        "tiny-dense objective.mask_ratio_max=0.3",
        "objective.mask_ratio_min=0.8",
        "the band 0.8 to 0.3 must satisfy",
    ),
    "pairs without a band": (
        "tiny-dense objective.mask_ratio_min=0.3 objective.mask_ratio_max=0.8",
        "objective.complementary_masks=true",
        "1 - mask_ratio_min 0.3 is not mask_ratio_max 0.8; use 0.3 to 0.7",
    ),
    "half a pair": (
        "tiny-dense objective.complementary_masks=true",
        "training.global_batch_size=7",
        "7 is odd, and objective.complementary_masks makes pairs of samples; use 8",
    ),
    "causal pairs": (
        "tiny-dense objective.kind=autoregressive",
        "objective.complementary_masks=true",
        "kind autoregressive masks no token; remove complementary_masks",
    ),
    "noise for ever": (
        "tiny-dense objective.mask_embedding_noise=0.1",
        "objective.mask_embedding_noise_steps=0",
        "0 with mask_embedding_noise 0.1: give both",
    ),
    "negative noise": ("tiny-dense", "objective.mask_embedding_noise=-1", "-1.0 must be a number, 0 or more"),
    "negative noise steps": ("tiny-dense", "objective.mask_embedding_noise_steps=-1", "-1 must not be negative"),
    "causal embedding noise": (
        "tiny-dense objective.kind=autoregressive objective.mask_embedding_noise_steps=9",
        "objective.mask_embedding_noise=0.1",
        "kind autoregressive masks no token; remove mask_embedding_noise",
    ),
    "epsilon": ("tiny-dense", "objective.epsilon=0", "0 with mask_ratio_min 0 lets the mask ratio be 0"),
    "block of nothing": ("tiny-dense", "objective.block_size=0", "0 must be greater than 0; null is full attention"),
    "causal blocks": (
        "tiny-dense objective.kind=autoregressive",
        "objective.block_size=32",
        "32 with kind autoregressive, whose attention is causal; remove the block size",
    ),
    "all replaced": ("tiny-dense", "objective.replace_ratio=1", "1.0 must be at least 0 and less than 1"),
    "causal noise": (
        "tiny-dense objective.kind=autoregressive",
        "objective.replace_ratio=0.1",
        "0.1 with kind autoregressive, which has no noise; remove the replace ratio",
    ),
    "answers in text": ("tiny-dense", "objective.normalization=answer_length", "prepared text has none"),
    "answers in next tokens": (
        "tiny-dense objective.kind=autoregressive",
        "objective.normalization=answer_length",
        "answer_length needs samples with a prompt and an answer",
    ),
    "random length": ("tiny-dense", "objective.random_length_probability=1.5", "1.5 must lie between 0 and 1"),
    "no data": ("tiny-dense", "data.sets=[]", "empty; name at least one prepared set"),
    "weight": ("tiny-dense", "data.sets.0.weight=0", "0.0 must be greater than 0; remove the set instead"),
    "no validation": (
        "tiny-dense data.validation_fraction=0",
        "validation.interval=10",
        "10, but data.validation_fraction 0 holds no documents out",
    ),
    "beta": ("tiny-dense", "optimizer.beta2=1", "1.0 must be at least 0 and less than 1"),
    "warm-up": (
        "tiny-dense optimizer.learning_rate.warmup_steps=60",
        "optimizer.learning_rate.decay_steps=50",
        "warmup_steps 60 + decay_steps 50 = 110 is more than training.steps 100",
    ),
    "final": ("tiny-dense", "optimizer.learning_rate.final=1e-5", "1e-05 is never reached: decay_steps is 0"),
    "final above": (
        "tiny-dense optimizer.learning_rate.decay_steps=5",
        "optimizer.learning_rate.final=1",
        "1.0 must lie between 0 and",
    ),
    "inverse": (
        "tiny-dense optimizer.learning_rate.decay_steps=5 optimizer.learning_rate.decay_shape=inverse_sqrt",
        "optimizer.learning_rate.final=0",
        "an inverse square root never reaches 0",
    ),
    "keep": ("tiny-dense", "checkpoint.keep_last=0", "0 must be greater than 0"),
    "keep every": ("tiny-dense checkpoint.interval=10", "checkpoint.keep_every=25", "25 is not a multiple of"),
    "keep every -1": ("tiny-dense", "checkpoint.keep_every=-1", "-1 must not be negative"),
    "failures": ("tiny-dense", "checkpoint.max_failures=0", "0 must be greater than 0"),
    "copy": ("tiny-dense output_dir=here", "checkpoint.copy_to=./here", "must name another folder than output_dir"),
    "output": ("tiny-dense", 'output_dir=""', "empty; name the folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_combinations_are_refused_with_the_arithmetic(tmp_path, case):
    context, override, message = REFUSED[case]
    model, *overrides = context.split()
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(tmp_path, model), [*overrides, override])
    key = override.partition("=")[0]
    lines = str(caught.value).splitlines()
    assert any(message in line and f" {key}: " in line for line in lines), lines
    assert any(f"override {override}" in line or str(tmp_path) in line for line in lines), lines


def test_defaults_are_blamed_on_the_mapping_that_left_them_out(tmp_path):
    path = run_file(tmp_path, "tiny-moe")
    path.write_text(path.read_text() + "layout:\n  tensor_parallel: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == f"{path}:13: layout.sequence_parallel: {TP_WITHOUT_SP}"


def test_drops_follow_one_another_inside_the_constant_part(tmp_path):
    base = ["optimizer.learning_rate.warmup_steps=10", "optimizer.learning_rate.decay_steps=20"]
    key = "optimizer.learning_rate.drops"
    path = run_file(tmp_path, "tiny-dense")
    load_run(path, [*base, f"{key}=[{{step: 10, value: 1e-3}}, {{step: 79, value: 1e-4}}]"])
    for drops, message in {
        "[{step: 9, value: 1e-4}]": "drops.0.step: 9 is outside the constant part, steps 10 to 79",
        "[{step: 80, value: 1e-4}]": "drops.0.step: 80 is outside the constant part, steps 10 to 79",
        "[{step: 30, value: 1e-4}, {step: 20, value: 1e-5}]": (
            "drops.1.step: 20 does not come after the drop at step 30"
        ),
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_run(path, [*base, f"{key}={drops}"])
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-moe-softmax"])
def test_the_layouts_of_the_parity_table_pass(tmp_path, name):
    moe = load_model(name).moe is not None
    tensor = {"tensor_parallel": 2, "sequence_parallel": True}
    layouts = [
        {},
        tensor,
        {"tensor_parallel": 4, "sequence_parallel": True},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 4},
        {"pipeline_parallel": 2, "pipeline_chunks_per_rank": 2},
        {"context_parallel": 2},
        {"data_parallel": 2},
        {**tensor, "pipeline_parallel": 2},
        {**tensor, "context_parallel": 2},
    ]
    if moe:
        layouts += [
            {"data_parallel": 2, "expert_parallel": 2},
            {**tensor, "expert_parallel": 2},
            {"context_parallel": 2, "expert_parallel": 2},
            {**tensor, "data_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2},
        ]
    else:
        layouts += [{"tensor_parallel": 2}]
    run = load_run(run_file(tmp_path, name))
    for layout in layouts:
        validate_run(dataclasses.replace(run, layout=LayoutConfig(**layout)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: load_run(run_file(folder, name)) for name in ("tiny-moe", "tiny-dense")}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_validation_never_fails_in_another_way(runs, data):
    """Whatever numbers are written, the answer is a valid run or a ConfigError."""
    values = to_dict(runs[data.draw(st.sampled_from(["tiny-moe", "tiny-dense"]))])
    numbers = [
        path for path, value in _leaves(values) if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    for path in data.draw(st.lists(st.sampled_from(numbers), max_size=4)):
        node = values
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = data.draw(st.integers(-3, 70)) * (1 if isinstance(node[path[-1]], int) else 0.1)
    try:
        validate_run(from_dict(RunConfig, values))
    except ConfigError as error:
        assert str(error)


def _leaves(value, path=()):
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(_leaves(child, (*path, key)) for key, child in value.items()))
    return [(path, value)]


@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(1, 1, 1), (4, 2, 1), (4, 6, 1), (4, 3, 1), (2, 4, 2)])
def test_fewest_data_parallel_ranks_that_the_experts_need(tensor, expert, expert_tensor):
    fitting = (data for data in range(1, 100) if tensor * data % (expert * expert_tensor) == 0)
    assert data_parallel_for_experts(tensor, expert, expert_tensor) == next(fitting)
