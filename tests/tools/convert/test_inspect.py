"""`llada convert inspect`: what is in a checkpoint of either kind, what is missing, too much, or of a wrong shape."""

import json

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_model, to_dict
from llada_megatron.llada_moe.model.parameters import count_parameters
from tests.tools.convert.checkpoints import MODELS, config_of, tensors_of, to_huggingface, to_sharded, write, written


def inspect(capsys, path):
    """Exit code, the printed rows as a table, and the JSON object."""
    code = cli.main(["convert", "inspect", str(path), "--json"])
    captured = capsys.readouterr()
    *lines, report = captured.out.splitlines()
    assert not captured.err or code
    return code, {line[:14].strip(): line[14:] for line in lines}, json.loads(report)


@pytest.mark.parametrize("model", MODELS)
def test_both_kinds(capsys, tmp_path, model):
    source = written(tmp_path / "source", model, files=3)
    to_sharded(source, tmp_path / "sharded", "tensor_parallel=2,pipeline_parallel=2")
    to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    config, tensors = load_model(model), tensors_of(model)
    parameters = sum(value.numel() for value in tensors.values())
    in_float32 = sum(value.numel() for value in tensors.values() if value.dtype == torch.float32)
    for path, kind in (
        (source, "Hugging Face, "),
        (tmp_path / "sharded", "sharded, step 0"),
        (tmp_path / "exported", "Hu"),
    ):
        code, rows, report = inspect(capsys, path)
        assert code == 0 and rows["what"].startswith(kind) and rows["family"] == config.family == report["family"]
        assert report["parameters"] == parameters and rows["parameters"].startswith(f"{parameters:,}, of which ")
        assert report["active"] == count_parameters(config).active
        assert report["dtypes"] == {"bfloat16": parameters - in_float32} | (
            {"float32": in_float32} if in_float32 else {}
        )
        assert report["missing"] == report["extra"] == report["wrong_shape"] == report["faults"] == []
        assert rows["tensors"] == "all there, none too many, every shape right"
        assert rows["tokenizer"] == "none" and report["tokenizer"] is None
        assert report["objective"] == "diffusion" and report["block_size"] == (32 if model == "tiny-moe" else None)
        assert report["model"]["hidden_size"] == 64 and ("experts" in rows) == (config.moe is not None)
        assert rows["sizes"].startswith("num_layers 4, hidden_size 64, ")
    _, rows, report = inspect(capsys, tmp_path / "sharded")
    assert rows["layout"] == "tensor_parallel 2, pipeline_parallel 2" and rows["samples seen"] == "0"
    assert rows["imported from"].startswith("source (")
    assert report["files"] == 4 + 3 and report["bytes"] > 2 * parameters
    _, rows, report = inspect(capsys, source)
    assert report["files"] == 3 and report["bytes"] == sum(value.nbytes for value in tensors.values())


def test_a_step_and_a_run_are_the_same(capsys, tmp_path):
    to_sharded(written(tmp_path / "source", "tiny-dense"), tmp_path / "out")
    found = [inspect(capsys, tmp_path / "out" / path) for path in ("", "checkpoints", "checkpoints/step-00000000")]
    assert found[0] == found[1] == found[2] and found[0][0] == 0
    assert found[0][2]["model"] == to_dict(load_model("tiny-dense"))


def test_what_is_wrong(capsys, tmp_path):
    tensors = dict(tensors_of("tiny-moe-softmax"))
    gone = [tensors.pop(f"model.layers.3.mlp.experts.{expert}.up_proj.weight").shape for expert in range(7)]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.bias"] = torch.ones(256)
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.embed_tokens.weight"] = torch.ones(272, 64)
    source = write(tmp_path / "source", tensors, config_of("tiny-moe-softmax"))
    code, rows, report = inspect(capsys, source)
    assert code == 1 and len(report["missing"]) == len(gone) == 7
    assert report["extra"] == ["lm_head.bias"]
    assert report["wrong_shape"] == ["model.norm.weight (expected [64], found [65])"]
    assert report["notes"] == [
        "model.embed_tokens.weight: 16 rows below the vocabulary of 256 are padding",
        "1 tensor is no part of the model proper (model.layers.0.self_attn.rotary_emb.inv_freq)",
    ]
    assert [fault.split(":")[0] for fault in report["faults"]] == [
        "7 tensors are missing",
        "1 tensor is not of this model",
        "1 tensor is of a wrong shape",
    ]
    assert report["faults"][0].endswith("experts.4.up_proj.weight and 2 more")
    assert "tensors" not in rows and rows["wrong"] == report["faults"][2]


def test_a_parent_without_a_mask_token(capsys, tmp_path):
    config = {"model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config |= {
        "num_attention_heads": 1,
        "max_position_embeddings": 8,
        "eos_token_id": 1,
        "head_dim": 8,
        "num_key_value_heads": 1,
    }
    source = write(tmp_path / "source", {"model.norm.weight": torch.ones(8)}, config)
    code, rows, report = inspect(capsys, source)
    assert code == 1 and rows["mask token"] == "none; an import needs --mask-token-id"
    assert report["objective"] == "autoregressive" and len(report["missing"]) == 13


def test_tokenizer_files_are_found(capsys, tmp_path):
    source = written(tmp_path / "source", "tiny-dense")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenization_llada.py").write_text("raise SystemExit")
    assert inspect(capsys, source)[1]["tokenizer"] == str(source)


def test_what_cannot_be_inspected(capsys, tmp_path):
    source = written(tmp_path / "source", "tiny-dense")
    (source / "model.safetensors").write_bytes(b"\0" * 20)
    for path, message in ((source, "model.safetensors"), (tmp_path / "absent", "is not a directory")):
        code = cli.main(["convert", "inspect", str(path), "--json"])
        captured = capsys.readouterr()
        assert code == 1 and message in captured.err and json.loads(captured.out)["exit_code"] == 1
