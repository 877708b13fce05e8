"""What a run may train and leave frozen, and what is refused, each in one line."""

from __future__ import annotations

import pytest

from llada_megatron.launch.announcement import announcement
from llada_megatron.launch.resources import checkpoint_bytes, needed_bytes
from llada_megatron.llada_moe.config import load_run, to_dict
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig, is_trained, linear_layers, place_of
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.parameters import count_parameters, trained_parameters
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.llada_moe.planning.workload import widths_of
from llada_megatron.tools.plan.report import trained_lines
from tests.llada_moe.config.test_validation import run_file

REFUSED = {
    "rank 0": ("tiny-dense", "training.lora={rank: 0}", "training.lora.rank: 0 must be at least 1"),
    "wide rank": ("tiny-moe", "training.lora={rank: 33}", "33 is more than 32, the width of mlp.experts.linear_fc2"),
    "alpha": ("tiny-dense", "training.lora={alpha: 0}", "training.lora.alpha: 0.0 must be greater than 0"),
    "unknown target": ("tiny-dense", "training.lora={targets: [linear_qvk]}", "did you mean 'linear_qkv'?"),
    "no such layer": (
        "tiny-dense",
        "training.lora={targets: [linear_qkv, experts.linear_fc1]}",
        "experts.linear_fc1: the model has no such layer; it has self_attention.linear_qkv",
    ),
    "no target": ("tiny-dense", "training.lora={targets: []}", "nothing would be left to train; name a layer"),
    "target twice": ("tiny-dense", "training.lora={targets: [linear_qkv, linear_qkv]}", "linear_qkv: named twice"),
    "fp8": (
        "llada2-mini",
        "training.lora={} training.precision=bf16 training.fp8={recipe: blockwise, param_gather: true}",
        "training.lora: does not go together with training.fp8",
    ),
    "both": ("tiny-moe", "training.lora={} training.frozen=[router]", "training.lora freezes every weight already"),
    "overlap": (
        "tiny-moe",
        "training.lora={} layout.overlap_shared_experts=true",
        "use false, or leave shared_experts out of training.lora.targets",
    ),
    "expert tensor": (
        "tiny-moe",
        "training.lora={} layout.expert_tensor_parallel=2 layout.data_parallel=2",
        "layout.expert_tensor_parallel: 2 with tensor_parallel 1: Megatron would count",
    ),
    "unknown part": ("tiny-moe", "training.frozen=[routers]", "did you mean 'router'?"),
    "no such part": ("tiny-dense", "training.frozen=[router]", "router: the model has none; its parts are embedding"),
    "tied": (
        "tiny-dense model.tie_embeddings=true",
        "training.frozen=[output_layer]",
        "output_layer: the model ties it to the embedding; freeze embedding",
    ),
    "everything": (
        "tiny-dense",
        "training.frozen=[embedding, output_layer, attention, mlp, norms]",
        "training.frozen: nothing would be left to train",
    ),
    "part twice": ("tiny-moe", "training.frozen=[router, router]", "router: named twice"),
}


def overrides(text: str) -> list[str]:
    """Words that begin a key, each with what follows it."""
    words: list[str] = []
    for word in text.split():
        if "=" in word:
            words.append(word)
        else:
            words[-1] += f" {word}"
    return words


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    model, change, message = REFUSED[case]
    model, *more = model.split()
    with pytest.raises(ConfigError) as error:
        load_run(run_file(tmp_path, model), [*more, *overrides(change)])
    assert message in str(error.value), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_defaults_adapt_every_linear_layer_of_the_layers(tmp_path):
    run = load_run(run_file(tmp_path, "tiny-moe"), ["training.lora={rank: 8}", "training.precision=bf16"])
    lora = run.training.lora
    assert lora.places(run.model).keys() == linear_layers(run.model).keys() and len(linear_layers(run.model)) == 8
    assert lora.scale == 4.0 and to_dict(run)["training"]["lora"]["rank"] == 8
    only = LoRAConfig(targets=["experts.linear_fc1"])
    assert list(only.places(run.model)) == ["mlp.experts.linear_fc1"]


@pytest.mark.parametrize("change", ["training.lora={rank: 8}", "training.frozen=[experts, embedding]"])
def test_memory_disk_and_plan_count_what_is_trained(tmp_path, change):
    run = load_run(run_file(tmp_path, "tiny-moe"), [change])
    trained, total = trained_parameters(run.model, run.training), count_parameters(run.model).trainable
    factors = trained if run.training.lora else 0
    assert 0 < trained < total
    assert checkpoint_bytes(run) == 2 * (total + factors) + 12 * trained
    widths = widths_of(run)
    assert (widths.gradient, widths.moments) == pytest.approx((4 * trained / total, 8 * trained / total))
    assert widths.weight == pytest.approx(2 * (1 + factors / total))
    assert needed_bytes(run) < needed_bytes(load_run(run_file(tmp_path, "tiny-moe")))
    (line,) = trained_lines(Estimate(run, load_gpu("h100"), Assumptions()))
    assert f"({trained / total:.2%} of the model's)" in line
    assert ("of LoRA, which are trained" if factors else "are trained") in announcement(run, here=False)


def test_a_module_and_a_weight_of_a_checkpoint_have_one_place():
    assert place_of("decoder.layers.3.mlp.experts.local_experts.2.linear_fc1") == "mlp.experts.linear_fc1"
    assert place_of("decoder.layers.3.mlp.experts.experts.linear_fc1") == "mlp.experts.linear_fc1"
    assert place_of("decoder.layers.0.mlp.shared_experts.linear_fc2") == "mlp.shared_experts.linear_fc2"
    assert place_of("output_layer") is None


def test_frozen_parts_are_told_by_the_names_of_weights(tmp_path):
    def trained(frozen: str) -> list[str]:
        run = load_run(run_file(tmp_path, "tiny-moe"), [f"training.frozen={frozen}"])
        return [name for name in NAMES if is_trained(run.training, name)]

    assert trained("[embedding, router, norms]") == [NAMES[1], NAMES[2], NAMES[5], NAMES[6]]
    assert trained("[output_layer, attention, mlp, experts]") == [NAMES[0], NAMES[3], NAMES[4], NAMES[7]]


NAMES = [
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.q_layernorm.weight",
    "decoder.layers.1.mlp.router.weight",
    "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.final_layernorm.weight",
]
