"""FP8 that no GPU could run is refused by what is written, with the values that could."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from llada_megatron.llada_moe.config import dump_yaml, load_run
from llada_megatron.llada_moe.config.fp8 import WIDTH_MULTIPLE, check_fp8
from llada_megatron.llada_moe.errors import ConfigError

BASE = [
    "training.recompute=none",
    "training.recompute_modules=[]",
    "training.precision=bf16",
    "data.sets=[{path: data/a}]",
    "output_dir=runs/x",
]
REFUSED = {
    "precision": ("recipe=tensorwise", ["training.precision=fp32"], "training.fp8: needs training.precision bf16"),
    "no recipe": ("num_layers_at_start_in_bf16=1", [], "training.fp8.recipe: missing"),
    "dispatcher": (
        "recipe=tensorwise",
        ["layout.expert_dispatcher=allgather"],
        "layout.expert_dispatcher: allgather cannot pad the tokens of each expert",
    ),
    "first layers": (
        "recipe=delayed",
        ["training.fp8.num_layers_at_start_in_bf16=1"],
        "num_layers_at_start_in_bf16: 1 with recipe delayed",
    ),
    "run again": (
        "recipe=delayed",
        ["training.recompute=selective", "training.recompute_modules=[core_attn, moe_act]"],
        "training.recompute_modules: moe_act with FP8 recipe delayed",
    ),
    "too many layers": (
        "recipe=tensorwise",
        ["training.fp8.num_layers_at_end_in_bf16=9"],
        "num_layers_at_end_in_bf16: 9 must lie between 0 and 8",
    ),
    "no layer": (
        "recipe=tensorwise",
        ["training.fp8.num_layers_at_end_in_bf16=8", "training.fp8.num_layers_at_start_in_bf16=8"],
        "no layer is left in FP8 of 16",
    ),
    "history": ("recipe=delayed", ["training.fp8.amax_history_length=0"], "amax_history_length: 0 must be at least 1"),
    "no history": ("recipe=mxfp8", ["training.fp8.amax_history_length=8"], "recipe mxfp8 has no history"),
    "weights in FP8": (
        "recipe=delayed",
        ["training.fp8.param_gather=true"],
        "training.fp8.param_gather: true with recipe delayed: a weight that was never used has no maxima",
    ),
    "weights in FP8 and Adam": (
        "recipe=blockwise",
        ["training.fp8.param_gather=true", "optimizer.exp_avg_dtype=bf16"],
        "optimizer.exp_avg_dtype: bf16 with training.fp8.param_gather",
    ),
    "weights in FP8 to start from": (
        "recipe=blockwise",
        ["training.fp8.param_gather=true", "checkpoint.load=imports/a"],
        "checkpoint.load: with training.fp8.param_gather the main weights would begin rounded to FP8",
    ),
    "hidden": (
        "recipe=blockwise",
        ["model.hidden_size=2000"],
        "model.hidden_size: 2000 is not a multiple of 128, which FP8 with recipe blockwise needs; the nearest "
        "hidden_size that can be: 1920 or 2048",
    ),
    "experts": (
        "recipe=mxfp8",
        ["model.moe.expert_ffn_hidden_size=1016"],
        "model.moe.expert_ffn_hidden_size: 1016 is not a multiple of 32",
    ),
    "experts in parts": (
        "recipe=tensorwise",
        ["model.moe.expert_ffn_hidden_size=1048", "layout.expert_tensor_parallel=2", "layout.expert_parallel=1"],
        "1048 / expert_tensor_parallel 2 = 524 a rank is not a multiple of 16, which FP8 with recipe tensorwise needs; "
        "the nearest moe.expert_ffn_hidden_size that can be: 1024 or 1056; or lower expert_tensor_parallel",
    ),
    "heads": (
        "recipe=blockwise",
        ["model.num_key_value_heads=1", "model.head_dim=48", "layout.tensor_parallel=2"],
        "model.head_dim: 18 x 48 / tensor_parallel 2 = 432 a rank is not a multiple of 128",
    ),
    "tokens": (
        "recipe=tensorwise",
        ["training.sequence_length=4088"],
        "training.sequence_length: micro_batch_size 1 x 4088 / context_parallel 1 / tensor_parallel 2 = 2044 tokens a "
        "rank, not a multiple of 16, which FP8 with recipe tensorwise needs; use 4064 or 4096",
    ),
}


def run_with(fp8, others=()):
    layout = ["layout.tensor_parallel=2", "layout.sequence_parallel=true", "layout.pipeline_parallel=2"]
    values = [*BASE, *layout, "training.micro_batch_size=1", *others, f"training.fp8.{fp8}"]
    return load_run("llada-moe-7b-a1b-pretrain", values)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_could_be(case):
    fp8, others, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        run_with(fp8, others)
    assert message in str(caught.value)


@pytest.mark.parametrize("recipe", WIDTH_MULTIPLE)
def test_the_published_model_can_be_trained_with_every_recipe(recipe):
    run = run_with(f"recipe={recipe}")
    assert run.training.fp8.recipe == recipe and f"recipe: {recipe}" in dump_yaml(run)
    assert run.training.without_fp8().fp8 is None


def test_a_dense_model_has_no_dispatcher_and_no_experts_to_refuse():
    run = load_run(
        "llada-8b-pretrain",
        ["training.fp8.recipe=blockwise", "layout.expert_dispatcher=allgather", "training.sequence_length=4096"],
    )
    assert run.training.fp8.recipe == "blockwise"


@pytest.mark.parametrize("recipe", WIDTH_MULTIPLE)
def test_the_widths_that_are_proposed_pass(recipe):
    """Of every width near a usual one: what is refused names the nearest two that are not."""
    run = run_with(f"recipe={recipe}")
    for width, parts in itertools.product(range(1000, 1070), (1, 2, 4)):
        model = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, expert_ffn_hidden_size=width))
        layout = dataclasses.replace(run.layout, expert_tensor_parallel=parts)
        refused = []
        check_fp8(run.training, model, layout, lambda key, message, refused=refused: refused.append((key, message)))
        step = WIDTH_MULTIPLE[recipe] * parts
        if width % step == 0:
            assert refused == []
            continue
        ((key, message),) = refused
        named = message.partition("that can be: ")[2].partition(";")[0].split(" or ")
        assert key == "model.moe.expert_ffn_hidden_size"
        assert [int(number) for number in named] == [width // step * step, math.ceil(width / step) * step]
