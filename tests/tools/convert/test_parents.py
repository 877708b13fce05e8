"""Autoregressive parents from directories as they are published: imported whole, found whole, and the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.huggingface.formats.bailing import BAILING, BAILING_V2
from llada_megatron.llada_moe.huggingface.formats.table import read_config
from llada_megatron.llada_moe.huggingface.mapping import tensor_shapes
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from tests.tools.convert.checkpoints import differing, read, to_huggingface, write

MASK = 63
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
CASES = {
    "Llama": ({}, "llama", "tensor_parallel=2,pipeline_parallel=2"),
    "Qwen3": ({"tie_word_embeddings": True}, "qwen3", "pipeline_parallel=2"),
    "Qwen3Moe": (EXPERTS, "qwen3_moe", "expert_parallel=4"),
}
LING = {
    **TINY, "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "first_k_dense_replace": 1,
    "moe_intermediate_size": 12, "moe_router_enable_expert_bias": True, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1,
    "num_shared_experts": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid", "tie_word_embeddings": False,
    "use_bias": False, "use_qk_norm": True, "use_qkv_bias": False, "mask_token_id": MASK,
}  # fmt: skip


def convert(capsys, *words):
    """Exit code, what was said to people, and the JSON object."""
    code = cli.main(["convert", *map(str, words), "--json"])
    captured = capsys.readouterr()
    *lines, report = captured.out.splitlines()
    return code, lines + captured.err.splitlines(), json.loads(report)


def whole_and_equal(capsys, source, sharded, kind):
    """Both are whole, say the same of their model, and verify finds no difference."""
    reports = []
    for path in (source, sharded):
        code, lines, report = convert(capsys, "inspect", path)
        assert code == 0 and report["faults"] == [], lines
        assert report["objective"] == "autoregressive" and report["block_size"] is None
        reports.append(report)
    assert reports[0]["kind"].startswith("Hugging Face, ") and reports[1]["kind"] == "sharded, step 0"
    assert reports[1]["history"]["imported from"] == f"{source.name} ({kind})"
    assert reports[0]["parameters"] == reports[1]["parameters"] and reports[0]["family"] == reports[1]["family"]
    code, lines, report = convert(capsys, "verify", source, sharded)
    assert code == 0 and report["equal"] and report["identical"] == report["tensors"], lines
    assert report["logits"]["compared"] and report["logits"]["equal"] and report["logits"]["reach"] > 0


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_parent_that_transformers_wrote(capsys, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    keys, kind, layout = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TINY | keys)).eval()
    for weight in model.parameters():  # the norms too
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len([*(tmp_path / "source").glob("*.safetensors")]) > 1
    words = ("import", tmp_path / "source", tmp_path / "sharded", "--layout", layout)
    code, _, report = convert(capsys, *words)
    assert code == 1 and "names no mask token: give --mask-token-id N" in report["error"]
    code, _, report = convert(capsys, *words, "--mask-token-id", MASK)
    assert code == 0 and report["format"] == kind
    whole_and_equal(capsys, tmp_path / "source", tmp_path / "sharded", kind)
    tokens = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(tmp_path / "sharded") as loaded:
        ours = loaded.logits(tokens, torch.ones_like(tokens, dtype=torch.bool), whole_sequences(2, 24))
    theirs = model(tokens).logits
    torch.testing.assert_close(ours.view_as(theirs), theirs, atol=1e-5, rtol=0)
    assert theirs.abs().max() > 1  # not equal because everything is zero


@pytest.mark.parametrize("table", [BAILING, BAILING_V2], ids=lambda table: table.name)
def test_ling_without_its_layer_for_further_tokens(capsys, tmp_path, table):
    config = LING | {"model_type": table.model_type}
    whole = read_config(table, config | {"num_hidden_layers": 5}, "config.json")  # the fifth stands for the further one
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in tensor_shapes(table, whole).items()}
    tensors |= {name: value.float() for name, value in tensors.items() if name.endswith("expert_bias")}
    further = {name for name in tensors if name.startswith("model.layers.4.")}
    for name, shape in (("eh_proj", (32, 64)), ("enorm", (32,)), ("hnorm", (32,)), ("final_layernorm", (32,))):
        tensors[f"model.layers.4.{name}.weight"] = torch.randn(shape).bfloat16()
    source = write(tmp_path / "source", tensors, config, files=3)
    code, lines, _ = convert(capsys, "import", source, tmp_path / "sharded", "--layout", "expert_parallel=2")
    note = f"{len(further) + 4} tensors are no part of the model proper (model.layers.4."
    assert code == 0 and any(note in line for line in lines), lines
    whole_and_equal(capsys, source, tmp_path / "sharded", table.name)
    to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    expected = {name: value for name, value in tensors.items() if not name.startswith("model.layers.4.")}
    assert differing(read(tmp_path / "exported"), expected) == []
    exported = json.loads((tmp_path / "exported/config.json").read_text())
    assert (exported["model_type"], exported["num_hidden_layers"]) == ("llada2_moe", 4)
    assert "num_nextn_predict_layers" not in exported


def test_several_ends_of_a_text_are_told(capsys, tmp_path):
    config = LING | {"eos_token_id": [0, 5, 7], "num_nextn_predict_layers": 0}
    model = read_config(BAILING, config, "config.json")
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(BAILING, model).items()}
    code, lines, _ = convert(capsys, "import", write(tmp_path / "source", tensors, config), tmp_path / "out")
    note = "eos_token_id is [0, 5, 7]: a text ends with 0 here, the others are not kept"
    assert code == 0 and f"note: {note}" in lines
