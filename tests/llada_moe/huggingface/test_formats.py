"""The tables against the published checkpoints: counts, what is refused, and the logits of transformers' classes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import ModelConfig, MoEConfig, load_model, to_dict
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.formats import FORMATS, export_format, export_obstacle, find_format
from llada_megatron.llada_moe.huggingface.formats.bailing import BAILING, BAILING_V2
from llada_megatron.llada_moe.huggingface.formats.llada import LLADA
from llada_megatron.llada_moe.huggingface.formats.llada2 import LLADA2
from llada_megatron.llada_moe.huggingface.formats.llama import LLAMA
from llada_megatron.llada_moe.huggingface.formats.qwen3 import QWEN3, QWEN3_MOE
from llada_megatron.llada_moe.huggingface.formats.table import read_config, write_config
from llada_megatron.llada_moe.huggingface.mapping import mappings, merge, split, tensor_shapes
from llada_megatron.llada_moe.model.patterns import CAUSAL
from llada_megatron.parallel import topology
from tests.llada_moe.huggingface.our_model import canonical, logits

MASK = 63
LLADA2_MINI = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "attention_dropout": 0.0,
    "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5120, "max_position_embeddings": 32768, "max_window_layers": 28,
    "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False,
    "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1,
    "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
    "router_dtype": "fp32", "score_function": "sigmoid", "sliding_window": 4096, "tie_word_embeddings": False,
    "topk_group": 4, "use_bias": False, "use_cache": False, "use_qk_norm": True, "use_qkv_bias": False,
    "use_rmsnorm": True, "vocab_size": 157184,
}  # fmt: skip
PUBLISHED = {
    "llada-8b": ({
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
        "attention_dropout": 0.0, "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1,
        "block_type": "llama", "d_model": 4096, "embedding_size": 126464, "eos_token_id": 126081,
        "flash_attention": False, "include_bias": False, "include_qkv_bias": False, "init_std": 0.02,
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336,
        "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "multi_query_attention": None,
        "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "rms_norm_eps": 1e-05, "rope": True,
        "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
        "vocab_size": 126464, "weight_tying": False,
    }, 291, 8_015_581_184),
    "llada-moe-7b-a1b": ({
        "architectures": ["LLaDAMoEModel"], "model_type": "llada", "attention_bias": False, "attention_dropout": 0.0,
        "dense_intermediate_size": 8192, "eos_token_id": 156892, "expert_intermediate_size": 1024,
        "hidden_act": "silu", "hidden_size": 2048, "max_position_embeddings": 8192, "moe_layer_freq": [1] * 16,
        "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 1,
        "qk_layernorm": True, "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01, "router_num_group": None, "router_topk_group": None,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "vocab_size": 157184,
    }, 3219, 7_356_880_896),
    "llada2-mini": (LLADA2_MINI, 14813, 16_255_643_392),
    "llada2-flash": ({
        **LLADA2_MINI, "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024,
        "num_attention_heads": 32, "num_hidden_layers": 32,
    }, 24161, 102_889_705_216),
}  # fmt: skip
LLADA2_FLASH = PUBLISHED["llada2-flash"][0]
PUBLISHED["llada2.2-flash"] = ({
    **{key: value for key, value in LLADA2_FLASH.items() if key != "sliding_window"}, "block_size": 32,
    "delete_token_id": 156930, "expert_capacity": 48, "max_position_embeddings": 131072, "rope_theta": 3000000,
    "split_token_id": 156931,
}, *PUBLISHED["llada2-flash"][1:])  # fmt: skip
LING_MINI = {
    **{key: value for key, value in LLADA2_MINI.items() if key not in ("max_window_layers", "sliding_window")},
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "eos_token_id": 156892,
    "max_position_embeddings": 8192, "moe_shared_expert_intermediate_size": 512, "mtp_loss_scaling_factor": 0,
    "num_nextn_predict_layers": 0, "use_cache": True,
}  # fmt: skip
TINY_LING = {
    **LING_MINI, "model_type": "bailing_moe_v2", "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "moe_intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_nextn_predict_layers": 1,
    "vocab_size": 64, "mask_token_id": MASK, "eos_token_id": 0,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


def architecture(model):
    """What a published configuration says; how weights are initialised and experts balanced in training it does not."""
    values = to_dict(model)
    values["moe"] = values["moe"] and {k: v for k, v in values["moe"].items() if k != "z_loss_coefficient"}
    return values


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_checkpoints_have_these_tensors(name):
    config, tensors, parameters = PUBLISHED[name]
    config = json.loads(json.dumps(config))
    table = find_format(config, "config.json")
    model = read_config(table, config, "config.json")
    assert architecture(model) == architecture(load_model(name))
    shapes = tensor_shapes(table, model)
    assert len(shapes) == tensors and sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert export_format(model) is table
    written = write_config(table, model)
    wrong = {key: (value, config[key]) for key, value in written.items() if config.get(key, value) != value}
    assert wrong.keys() <= {"architectures"}  # that of LLaDA-MoE names a class without the output layer
    assert to_dict(read_config(find_format(written, "config.json"), written, "config.json")) == to_dict(model)


PARENTS = {
    "Llama-3-8B": ({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "vocab_size": 128256,
    }, "llada", 8_030_261_248),
    "Qwen3-8B-Base": ({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "eos_token_id": 151643,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 32768, "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }, "qwen3", 8_190_735_360),
    "Qwen3-30B-A3B-Base": ({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 32768, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }, "qwen3_moe", 30_532_122_624),
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_autoregressive_parents_have_their_published_size(name):
    config, family, parameters = PARENTS[name]
    table = find_format(config, "config.json")
    model = read_config(table, {**config, "mask_token_id": 128255}, "config.json")
    assert model.family == family and table.autoregressive
    assert sum(math.prod(shape) for shape in tensor_shapes(table, model).values()) == parameters


def test_the_parent_of_llada2_has_its_tensors():
    table = find_format(LING_MINI, "config.json")
    parent = read_config(table, LING_MINI, "config.json")
    child = dataclasses.replace(load_model("llada2-mini"), max_sequence_length=8192)
    assert table is BAILING and table.autoregressive and parent == child
    assert tensor_shapes(table, parent) == tensor_shapes(LLADA2, child)
    assert export_format(parent) is LLADA2
    with pytest.raises(CheckpointError, match="bailing_moe.*none fits.*Ling 2.0.*n_group"):
        find_format({key: value for key, value in LING_MINI.items() if key != "n_group"}, "config.json")


def test_layers_for_further_tokens_are_left_out():
    model = read_config(BAILING_V2, TINY_LING, "config.json")
    state = {name: torch.randn(shape) for name, shape in tensor_shapes(LLADA2, model).items()}
    further = {name: torch.randn(shape) for name, shape in tensor_shapes(
        LLADA2, dataclasses.replace(model, num_layers=model.num_layers + 1)
    ).items() if name.startswith("model.layers.3.")}  # fmt: skip
    further["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    assert not any(BAILING_V2.ignores(TINY_LING, name) for name in state)
    assert all(BAILING_V2.ignores(TINY_LING, name) for name in further)
    assert not any(BAILING_V2.ignores({**TINY_LING, "num_nextn_predict_layers": 0}, name) for name in further)
    assert not BAILING_V2.ignores(TINY_LING, "model.layers.4.input_layernorm.weight")
    ours, childs = (canonical(table, model, {**state, **further}) for table in (BAILING_V2, LLADA2))
    assert ours.keys() == childs.keys() and all(torch.equal(ours[key], childs[key]) for key in ours)


def transformers_model(name, **keys):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**{**TINY, **keys})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for weight in model.parameters():  # the norms too
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    return model, json.loads(json.dumps(config.to_dict()))


def checkpoint_of(model):
    """What save_pretrained would write: one tensor per expert."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, weight in enumerate(tensor):
                gate, up = weight.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                state |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            state |= {name.replace("down_proj", f"{i}.down_proj.weight"): weight for i, weight in enumerate(tensor)}
        else:
            state[name] = tensor
    return state


CASES = {
    "llama": (LLAMA, "Llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "llama, wide heads": (LLAMA, "Llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama, tied": (LLAMA, "Llama", {"tie_word_embeddings": True}),
    "qwen3": (QWEN3, "Qwen3", {}),
    "qwen3, tied": (QWEN3, "Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3 moe": (QWEN3_MOE, "Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3 moe, not normalized": (QWEN3_MOE, "Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, one_rank):
    table, name, keys = CASES[case]
    theirs, config = transformers_model(name, **keys)
    assert find_format(config, "config.json") is table and table.autoregressive
    model = read_config(table, {**config, "mask_token_id": MASK}, "config.json")
    state = checkpoint_of(theirs)
    assert state.keys() - tensor_shapes(table, model).keys() == ({"lm_head.weight"} if model.tie_embeddings else set())
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = logits(model, canonical(table, model, state), tokens, pattern=CAUSAL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1  # not equal because everything is zero


def test_both_spellings_of_the_rotation_are_read():
    tiny = {**TINY, "mask_token_id": MASK}
    old = {**tiny, "rope_theta": 500000.0, "rope_scaling": None}
    new = {**tiny, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    plain = {**tiny, "rope_theta": 500000.0, "rope_scaling": {"type": "default"}}
    several = {**old, "eos_token_id": [0, 7]}
    assert len({str(read_config(LLAMA, config, "config.json")) for config in (old, new, plain, several)}) == 1


REFUSED = {
    "no mask": (LLAMA, {"mask_token_id": None}, "LLaMA .* names no mask token: give --mask-token-id N"),
    "scaled": (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling = .*llama3.* is not supported .*only null is.*rotated by theta alone",
    ),
    "scaled, nested": (
        QWEN3,
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        "rope_scaling = .*yarn.* is not supported",
    ),
    "attention bias": (LLAMA, {"attention_bias": True}, "attention_bias = True .*have no bias"),
    "mlp bias": (LLAMA, {"mlp_bias": True}, "mlp_bias = True .*have no bias"),
    "window": (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True .*whole sequence"),
    "dense layers": (
        QWEN3_MOE,
        {**EXPERTS, "mlp_only_layers": [2]},
        r"mlp_only_layers = \[2\] .*first",
    ),
    "sparse step": (QWEN3_MOE, {**EXPERTS, "decoder_sparse_step": 2}, "decoder_sparse_step = 2 "),
    "no end": (QWEN3, {"eos_token_id": None}, "'eos_token_id' is missing"),
    "mask outside": (LLAMA, {"mask_token_id": 64}, "64 is outside the vocabulary of 64"),
    "no heads": (LLAMA, {"num_attention_heads": 0, "head_dim": None}, "'head_dim' does not follow"),
    "parent with blocks": (BAILING, {**LING_MINI, "expert_capacity": 48}, "expert_capacity = 48 .*by blocks"),
    "text for a number": (LLAMA, {"hidden_size": "32"}, "hidden_size = '32' is not a whole number"),
    "text for the width of heads": (
        LLAMA,
        {"num_attention_heads": "4", "head_dim": None},
        "num_attention_heads = '4' is not a whole number",
    ),
    "text for further tokens": (
        BAILING_V2,
        {**TINY_LING, "num_nextn_predict_layers": "1"},
        "num_nextn_predict_layers = '1' is not a whole number, 0 or more",
    ),
    "negative further tokens": (BAILING_V2, {**TINY_LING, "num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    "text for shared experts": (LLADA2, {**LLADA2_MINI, "num_shared_experts": "1"}, "num_shared_experts = '1' is not"),
    "shared experts that are a truth": (
        LLADA2,
        {**LLADA2_MINI, "num_shared_experts": True},
        "num_shared_experts = True",
    ),
    "text for a ratio": (
        LLADA,
        {**PUBLISHED["llada-8b"][0], "mlp_hidden_size": None, "mlp_ratio": "four"},
        "'mlp_hidden_size' does not follow from the other keys",
    ),
    "text for a truth": (
        QWEN3_MOE,
        {**EXPERTS, "norm_topk_prob": "false"},
        "norm_topk_prob = 'false' is not supported",
    ),
    "an end that is text": (LLAMA, {"eos_token_id": ["</s>"]}, "eos_token_id = '</s>' is not a whole number"),
    "quantised": (
        LLAMA,
        {"quantization_config": {"quant_method": "fp8"}, "hidden_act": "gelu"},
        r"quantization_config \(quant_method 'fp8'\): quantised weights are not read; take the checkpoint in bfloat16",
    ),
    "few for a block": (LLADA2, {**LLADA2_MINI, "expert_capacity": 4}, "4 experts for a block, but each of its tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_does_not_compute_is_refused(case):
    table, keys, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=f"^dir/config.json: .*{message}"):
        read_config(table, {**TINY, "mask_token_id": MASK, **keys}, "dir/config.json")


@pytest.mark.parametrize(("table", "name"), [(LLAMA, "Llama"), (QWEN3, "Qwen3"), (QWEN3_MOE, "Qwen3Moe")])
def test_keys_that_are_left_out_are_those_of_the_class_of_transformers(table, name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")()
    assert {key: getattr(theirs, key) for key in table.left_out} == table.left_out
    model = read_config(table, {"mask_token_id": MASK, "eos_token_id": 0}, "config.json")
    assert model.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert model.num_key_value_heads == theirs.num_key_value_heads and model.rms_norm_eps == theirs.rms_norm_eps
    assert model.tie_embeddings is theirs.tie_word_embeddings


LEFT_OUT = {
    # read from the published configuration classes, which are not in transformers
    "llada-8b": ({
        "rope_theta": ("rope_theta", 10000.0), "max_sequence_length": ("max_sequence_length", 1024),
        "weight_tying": ("tie_embeddings", True), "rms_norm_eps": ("rms_norm_eps", 1e-5),
        "mlp_hidden_size": ("ffn_hidden_size", 4 * 4096), "n_kv_heads": ("num_key_value_heads", 32),
    }, {"activation_type": "swiglu", "block_type": "sequential", "rope": False, "layer_norm_type": "default"}),
    "llada-moe-7b-a1b": ({
        "max_position_embeddings": ("max_sequence_length", 4096), "qk_layernorm": ("qk_norm", False),
        "router_aux_loss_coef": ("moe.aux_loss_coefficient", 0.01), "num_key_value_heads": ("num_key_value_heads", 16),
    }, {}),
    "llada2-mini": ({
        "partial_rotary_factor": ("rotary_fraction", 0.5), "rms_norm_eps": ("rms_norm_eps", 1e-5),
        "rope_theta": ("rope_theta", 10000.0), "max_position_embeddings": ("max_sequence_length", 16384),
        "n_group": ("moe.num_expert_groups", 8), "topk_group": ("moe.expert_groups_top_k", 4),
        "routed_scaling_factor": ("moe.routed_scaling_factor", 2.5), "use_qk_norm": ("qk_norm", True),
        "moe_router_enable_expert_bias": ("moe.expert_bias", True),
        "first_k_dense_replace": ("moe.leading_dense_layers", 0),
        "num_shared_experts": ("moe.shared_expert_ffn_hidden_size", 0),
    }, {"use_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_keys_that_are_left_out_are_those_of_the_published_class(name):
    read, refused = LEFT_OUT[name]
    config = PUBLISHED[name][0]
    table = find_format(config, "config.json")
    for key, (path, expected) in read.items():
        model = read_config(table, {k: v for k, v in config.items() if k != key}, "config.json")
        owner = model.moe if path.startswith("moe.") else model
        assert getattr(owner, path.removeprefix("moe.")) == expected, key
    for key, value in refused.items():
        rest = {k: v for k, v in config.items() if k != key}
        with pytest.raises(CheckpointError, match=rf"{key} = {value!r}, as the published class takes it .* left out,"):
            read_config(table, rest, "config.json")


def test_ling_has_other_defaults_than_its_child():
    config = {k: v for k, v in LING_MINI.items() if k not in ("use_qk_norm", "moe_router_enable_expert_bias")}
    model = read_config(BAILING, config, "config.json")
    assert model.qk_norm is False and model.moe.expert_bias is False


@pytest.mark.parametrize(("table", "config"), [(LLADA2, LLADA2_MINI), (BAILING, LING_MINI)])
def test_groups_that_the_published_router_scores_otherwise_are_not_imported(table, config):
    with pytest.raises(CheckpointError, match=r"^dir/config.json: moe.top_k 4 is not 2 x moe.expert_groups_top_k 4"):
        read_config(table, {**config, "num_experts_per_tok": 4}, "dir/config.json")


def test_why_a_model_cannot_be_exported():
    assert export_obstacle(load_model("tiny-moe")) is None
    wide = read_config(LLAMA, {**TINY, "mask_token_id": MASK, "head_dim": 16}, "config.json")
    assert "head_dim 16 (it would be read as 8)" in export_obstacle(wide)
    assert "qwen3 cannot be exported" in export_obstacle(dataclasses.replace(wide, family="qwen3"))


def test_an_unknown_model_type_lists_the_known():
    with pytest.raises(CheckpointError) as caught:
        find_format({"model_type": "gpt2"}, "config.json")
    assert all(table.model_type in str(caught.value) for table in FORMATS)


def test_a_model_type_of_two_formats():
    both = {"model_type": "llada", "d_model": 32, "num_experts": 4}
    with pytest.raises(
        CheckpointError, match=r"stands for several.* and more than one fits \(dense.*'d_model'; LLaDA-MoE"
    ):
        find_format(both, "config.json")
    assert find_format({**both, "num_experts": None}, "config.json") is LLADA
    with pytest.raises(CheckpointError, match="none fits"):
        find_format({"model_type": "llada"}, "config.json")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_what_is_read_only_says_why(family):
    model = dataclasses.replace(load_model("tiny-dense" if family == "qwen3" else "tiny-moe-softmax"), family=family)
    with pytest.raises(CheckpointError, match="cannot be exported: no diffusion model is published"):
        export_format(model)


@st.composite
def models(draw):
    """A format, and a small model that has the parts of its family."""
    table = draw(st.sampled_from(FORMATS))
    family = table.implied["family"]
    head_dim, groups = 2 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    moe = None
    if family not in ("llada", "qwen3"):
        shared, dense = draw(st.booleans()), draw(st.integers(0, layers - 1))
        moe = MoEConfig(
            num_experts=draw(st.integers(2, 4)), top_k=2, expert_ffn_hidden_size=draw(st.integers(1, 5)),
            shared_expert_ffn_hidden_size=3 if shared and family == "llada2" else 0,
            leading_dense_layers=dense if family == "llada2" else 0, expert_bias=family == "llada2",
        )  # fmt: skip
    return table, ModelConfig(
        family=family, num_layers=layers, hidden_size=draw(st.integers(1, 6)), ffn_hidden_size=draw(st.integers(1, 6)),
        num_attention_heads=groups * draw(st.integers(1, 3)), num_key_value_heads=groups, head_dim=head_dim,
        vocab_size=draw(st.integers(3, 20)), max_sequence_length=8, mask_token_id=1, eos_token_id=0,
        qk_norm=family != "llada", tie_embeddings=draw(st.booleans()), moe=moe,
    )  # fmt: skip


@given(models(), st.integers(1, 60))
def test_split_is_the_inverse_of_merge(drawn, block):
    table, model = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_megatron.llada_moe.huggingface.weights.BLOCK_ELEMENTS", block)
        found = list(mappings(table, model))
    shapes = tensor_shapes(table, model)
    rows = {name: 0 for name in shapes}
    first = 0
    for mapping in found:
        parts = []
        for part in mapping.parts:
            assert part.start == rows[part.name] < part.stop, "each row once, in order"
            rows[part.name] = part.stop
            shape = (part.stop - part.start, *part.shape[1:])
            parts.append(torch.arange(first, first := first + math.prod(shape)).reshape(shape))
        merged = merge(mapping.unit, parts, model)
        assert tuple(merged.shape) == mapping.unit.shape
        back = split(mapping, merged, model)
        assert len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))
        again = merge(mapping.unit, split(mapping, merged.flip(0), model), model)
        assert torch.equal(again, merged.flip(0))
    assert rows == {name: shape[0] for name, shape in shapes.items()}


def test_either_groups_or_blocks_are_written():
    grouped, blocks = load_model("llada2-mini"), load_model("llada2.2-mini", ["moe.routing_block_size=64"])
    limits = {"n_group", "topk_group", "expert_capacity", "block_size"}
    found = [{key: value for key, value in write_config(LLADA2, model).items() if key in limits}
             for model in (grouped, blocks)]  # fmt: skip
    assert found == [{"n_group": 8, "topk_group": 4}, {"expert_capacity": 48, "block_size": 64}]
    listed = {**write_config(LLADA2, grouped), "block_size": 64, "expert_capacity": 0}
    assert read_config(LLADA2, listed, "config.json") == grouped


def test_tokens_of_operations_are_written_where_there_are_any_and_refused_where_they_cannot_be():
    model = load_model("llada2.2-mini")
    written = write_config(LLADA2, model)
    assert (written["delete_token_id"], written["split_token_id"]) == (156930, 156931)
    assert not {"delete_token_id", "split_token_id"} & write_config(LLADA2, load_model("llada2-mini")).keys()
    with pytest.raises(CheckpointError, match="and insert_token_id, or neither"):
        read_config(LLADA2, {**written, "split_token_id": None}, "config.json")
    dense = dataclasses.replace(load_model("llada-8b"), delete_token_id=7, insert_token_id=8)
    with pytest.raises(CheckpointError, match=r"cannot hold.*delete_token_id 7 \(it would be read as None\)"):
        write_config(LLADA, dense)


def test_groups_that_the_published_router_would_score_otherwise_are_not_exported():
    model = load_model("tiny-moe", ["moe.expert_groups_top_k=4"])
    with pytest.raises(CheckpointError, match=r"moe.top_k 4 is not 2 x moe.expert_groups_top_k 4"):
        write_config(export_format(model), model)
