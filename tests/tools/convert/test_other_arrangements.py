"""Weights that others keep in another arrangement: merged experts are read, wrapped names and adapters explained."""

import json

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.errors import CheckpointError
from tests.tools.convert.checkpoints import (
    MODELS,
    config_of,
    differing,
    read,
    tensors_of,
    to_huggingface,
    to_sharded,
    write,
)
from tests.tools.convert.refusals.refusal import refused

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def stacked(tensors, one, experts):
    """`[experts, rows, columns]` of a projection, by the prefix of the layer."""
    first = ".mlp.experts.0."
    layers = [name.partition(first)[0] for name in tensors if name.endswith(f"{first}{one}.weight")]
    return {
        layer: torch.stack([tensors[f"{layer}.mlp.experts.{i}.{one}.weight"] for i in range(experts)])
        for layer in layers
    }


def merged(model, how):
    """The tensors of a model as dFactory or dInfer keep them."""
    whole = tensors_of(model)
    experts = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in whole if ".mlp.experts." in name)
    gate, up, down = (stacked(whole, one, experts) for one in PROJECTIONS)
    kept = {name: value for name, value in whole.items() if ".mlp.experts." not in name}
    for layer in gate:
        if how == "dInfer":
            kept |= {f"{layer}.mlp.w1": torch.cat([gate[layer], up[layer]], 1), f"{layer}.mlp.w2": down[layer]}
        else:
            each = dict(zip(PROJECTIONS, (gate[layer], up[layer], down[layer]), strict=True))
            kept |= {f"{layer}.mlp.experts.{one}": value for one, value in each.items()}
    return kept


@pytest.mark.parametrize("how", ["dFactory", "dInfer"])
@pytest.mark.parametrize("model", MODELS[1:])
def test_merged_experts_are_those_of_the_published_checkpoint(tmp_path, model, how):
    kinds = {"model_type": "llada2_moe_veomni"} if how == "dFactory" and model == "tiny-moe" else {}
    source = write(tmp_path / "source", merged(model, how), config_of(model) | kinds, files=2)
    summary = to_sharded(source, tmp_path / "sharded", "expert_parallel=2")
    assert summary["tensors"] == len(tensors_of(model))
    (note,) = [note for note in summary["notes"] if "merged" in note]
    assert "tensors hold the experts of a layer merged (model.layers." in note
    to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors_of(model)) == []
    assert cli.main(["convert", "verify", str(source), str(tmp_path / "exported"), "--no-logits"]) == 0


def test_merged_experts_of_another_number_or_beside_single_ones_are_not_taken(tmp_path):
    whole = merged("tiny-moe", "dFactory")
    name = next(name for name in whole if name.endswith("experts.up_proj"))
    fewer = whole | {name: whole[name][:-1].clone()}
    refused(
        write(tmp_path / "fewer", fewer, config_of("tiny-moe")), "tensors are missing", f"not of this model: {name}"
    )
    both = tensors_of("tiny-moe") | {name: whole[name]}
    refused(write(tmp_path / "both", both, config_of("tiny-moe")), f"1 tensor is not of this model: {name}")


WRAPPERS = {
    "module.": ("'module.'", "DistributedDataParallel or DeepSpeed"),
    "_orig_mod.": ("'_orig_mod.'", "torch.compile"),
    "policy.net.": ("'policy.net.'", "a wrapper around the model"),
}


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_prefix_of_a_wrapper_is_named(tmp_path, prefix):
    tensors = {prefix + name: value for name, value in tensors_of("tiny-dense").items()}
    source = write(tmp_path / "source", tensors, config_of("tiny-dense"))
    refused(source, *WRAPPERS[prefix], "save the weights of the model inside it")


def test_wrappers_of_single_layers_are_named(tmp_path, capsys):
    tensors = {
        name.replace("blocks.", "blocks._fsdp_wrapped_module."): value
        for name, value in tensors_of("tiny-dense").items()
    }
    source = write(tmp_path / "source", tensors, config_of("tiny-dense"))
    refused(source, "'_fsdp_wrapped_module.' (model.transformer.blocks._fsdp", "FullyShardedDataParallel")
    assert cli.main(["convert", "inspect", str(source)]) == 1
    assert "FullyShardedDataParallel puts there" in capsys.readouterr().out


def test_weights_without_the_output_layer_are_named(tmp_path):
    tensors = {
        name.removeprefix("model."): value for name, value in tensors_of("tiny-moe").items() if "lm_head" not in name
    }
    refused(
        write(tmp_path / "source", tensors, config_of("tiny-moe")),
        "no name begins with 'model.'",
        "AutoModelForCausalLM",
    )


def test_adapters_are_named(tmp_path):
    name = "model.transformer.blocks.0.q_proj"
    whole = dict(tensors_of("tiny-dense"))
    weight = whole.pop(f"{name}.weight")
    adapted = whole | {f"{name}.base_layer.weight": weight, f"{name}.lora_A.default.weight": torch.zeros(4, 64)}
    source = write(tmp_path / "source", adapted, config_of("tiny-dense"))
    refused(source, "there are adapters beside the weights", "merge_and_unload()")

    config = {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    (source / "model.safetensors").rename(tmp_path / "adapter/adapter_model.safetensors")
    refused(tmp_path / "adapter", "holds a LORA adapter of GSAI-ML/LLaDA-8B-Base and not a whole model", "merge_and_")


def test_an_adapter_beside_whole_weights_is_noted(tmp_path):
    source = write(tmp_path / "source", tensors_of("tiny-dense"), config_of("tiny-dense"))
    (source / "adapter_config.json").write_text("{}")
    assert any(note.startswith("adapter_config.json: ") for note in to_sharded(source, tmp_path / "out")["notes"])


def test_the_reason_is_not_guessed(tmp_path):
    tensors = dict(tensors_of("tiny-dense"))
    tensors["model.other"] = tensors.pop("model.transformer.ln_f.weight")
    with pytest.raises(CheckpointError) as caught:
        to_sharded(write(tmp_path / "source", tensors, config_of("tiny-dense")), tmp_path / "out")
    assert "that its config.json describes: 1 tensor is missing: model.transformer.ln_f.weight; 1" in str(caught.value)
