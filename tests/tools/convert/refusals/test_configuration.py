"""Configurations, layouts and sizes that a conversion refuses."""

import re
import time

import pytest
import torch

from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.tools.convert import parse_size
from llada_megatron.tools.convert.inspector import open_source
from tests.tools.convert.checkpoints import config_of, tensors_of, write
from tests.tools.convert.refusals.refusal import changed, refused


def test_an_unknown_kind_of_model_lists_the_known(source):
    message = refused(changed(source, model_type="gpt2"), "unknown model_type 'gpt2'")
    for kind in (
        "llada (dense LLaDA",
        "llada (LLaDA-MoE",
        "llada2_moe (",
        "bailing_moe_v2",
        "llama",
        "qwen3 (",
        "qwen3_moe",
    ):
        assert kind in message, message
    refused(changed(source, model_type=None), "unknown model_type None")
    ways = ("dense LLaDA (LLaDA-8B, LLaDA-1.5) has the key 'd_model'", "has the key 'num_experts'")
    refused(changed(source, num_experts=None), "'llada' stands for several formats", *ways)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_bias", True, "use_bias = True is not supported (only False is, in llada2)"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_scaling = {'rope_type': 'yarn'} is not supported"),
        ("expert_capacity", -1, "config.json: "),
        ("num_hidden_layers", "four", "num_hidden_layers = 'four' is not a whole number"),
        ("hidden_size", None, "'hidden_size' is missing; it is not a complete configuration"),
    ],
)
def test_a_configuration_that_asks_for_something_else(tmp_path, key, value, message):
    source = write(tmp_path / "source", tensors_of("tiny-moe"), config_of("tiny-moe") | {key: value})
    refused(source, str(source / "config.json"), message)


def test_a_parent_without_a_mask_token(tmp_path):
    from llada_megatron.llada_moe.huggingface.formats import llama

    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config |= {"num_attention_heads": 1, "max_position_embeddings": 8, "eos_token_id": 1}
    source = write(tmp_path / "source", {"model.norm.weight": torch.ones(8)}, config)
    refused(source, llama.LLAMA.title, "names no mask token: give --mask-token-id N")
    refused(source, "missing", mask_token_id=7)


def llama(tmp_path, **keys):
    """What a LLaMA's first tensor and configuration are."""
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 64}
    config |= {"num_attention_heads": 1, "max_position_embeddings": 8, "eos_token_id": 1}
    return write(tmp_path / "source", {"model.norm.weight": torch.ones(8)}, config | keys)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (64, "64 is outside the vocabulary of 64 (0 to 63)"),
        (-1, "-1 is outside the vocabulary"),
        (1, "1 is also eos_token_id"),
    ],
)
def test_a_mask_token_that_none_can_be(tmp_path, mask, message):
    for ends in (1, [1, 2]):
        text = refused(llama(tmp_path, eos_token_id=ends), message, error=ConfigError, mask_token_id=mask)
        assert text.startswith(f"--mask-token-id {mask}: ") and "config.json" not in text


def test_a_mask_token_takes_the_place_of_a_wrong_one(tmp_path):
    refused(llama(tmp_path, mask_token_id=1000), "config.json", "1000 is outside the vocabulary")
    refused(llama(tmp_path, mask_token_id=1000), "missing", mask_token_id=7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_layers: 10000000 must be at most 10000"),
        ({"num_experts": 10**7}, "moe.num_experts: 10000000 must be at most 65536"),
        ({"num_experts": 65_536}, "describes 4 layers of 65,536 experts, and there are"),
        ({"vocab_size": 10**12}, "parameters, and there are"),
        ({"expert_intermediate_size": 10**15}, "parameters, and there are"),
    ],
)
def test_sizes_beyond_all_measure_are_refused_at_once(source, tmp_path, keys, message):
    if "num_hidden_layers" in keys:
        source = llama(tmp_path / "parent", mask_token_id=7, **keys)
    else:
        changed(source, **keys)
    begin = time.monotonic()
    refused(source, "config.json", message)
    assert time.monotonic() - begin < 2
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_source(source)


def test_quantised_weights_are_refused_before_their_tensors(source):
    changed(source, quantization_config={"quant_method": "gptq", "bits": 4})
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, "quantization_config (quant_method 'gptq'): quantised weights are not read")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tensor_parallel=3", "tensor_parallel: 3 does not divide num_attention_heads 4; use one of 1, 2, 4"),
        ("pipeline_parallel=3", "pipeline_parallel: 3 does not divide num_layers 4"),
        ("expert_parallel=3", "expert_parallel: 3 does not divide num_experts 8; use one of 1, 2, 4, 8"),
        ("pipeline_parallel=2,pipeline_chunks_per_rank=3", "pipeline_parallel 2 x 3 chunks = 6 does not divide"),
    ],
)
def test_a_layout_that_does_not_fit(source, layout, message):
    refused(source, "--layout: ", message, error=ConfigError, layout=layout)


@pytest.mark.parametrize(
    "layout", ["data_parallel=2", "tensor=2", "tensor_parallel", "tensor_parallel=0", "expert_parallel=x,"]
)
def test_a_layout_that_is_none(source, layout):
    refused(source, f"--layout {layout.rstrip(',')}: it takes tensor_parallel=N", error=ConfigError, layout=layout)


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "nan GB", "inf", "GB", "5 XB", "1e400GB"])
def test_sizes(text):
    if text == "5":
        assert parse_size(text) == 5
        assert [parse_size(word) for word in ("5GB", "1.5 kb", "2GiB", "64mib")] == [5 * 10**9, 1500, 2**31, 2**26]
        return
    with pytest.raises(ConfigError, match="a size such as 5GB, 500MB or 2GiB"):
        parse_size(text)
