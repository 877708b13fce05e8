"""Tensors that a conversion refuses: other names, shapes, types or numbers than the model has."""

import json
import re

import pytest
import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.tools.convert.source import is_padding
from tests.tools.convert.checkpoints import config_of, differing, read, tensors_of, to_huggingface, to_sharded, write
from tests.tools.convert.refusals.refusal import GATE, QUERY, refused, rewritten


def test_an_extra_and_a_missing_tensor(source):
    def change(tensors):
        tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(64)
        del tensors[QUERY]

    message = refused(rewritten(source, change), str(source), "LLaDA-MoE", "config.json describes")
    assert (
        f"1 tensor is missing: {QUERY}; 1 tensor is not of this model: model.layers.9.input_layernorm.weight" in message
    )


def test_a_wrong_shape(source):
    def change(tensors):
        tensors[GATE] = torch.zeros(8, 32, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200]

    message = refused(rewritten(source, change), "2 tensors are of a wrong shape")
    assert f"{GATE} (expected [8, 64], found [8, 32])" in message
    assert "lm_head.weight (expected [256, 64], found [200, 64])" in message


def test_many_faults_are_counted(source):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    assert re.search(r"96 tensors are missing: (\S+, ){4}\S+ and 91 more", refused(rewritten(source, change)))


def test_float16_is_converted_on_request_only(source, tmp_path):
    def change(tensors):
        tensors |= {name: value.half() for name, value in tensors.items()}

    rewritten(source, change)
    refused(source, "is torch.float16", "--dtype bf16 or fp32")
    to_sharded(source, tmp_path / "out", dtype=torch.float32)
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    expected = {name: value.half().float() for name, value in tensors_of("tiny-moe-softmax").items()}
    assert differing(read(tmp_path / "exported"), expected) == []


def test_quantised_weights(source):
    def change(tensors):
        tensors[QUERY] = torch.zeros(64, 64, dtype=torch.int8)

    refused(rewritten(source, change), f"{QUERY} is torch.int8", "quantised weights are not read")
    refused(source, "torch.int8", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [QUERY, "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_parts_of_one_weight_with_different_dtypes(source, tmp_path, name):
    def change(tensors):
        tensors[name] = tensors[name].float()

    rewritten(source, change)
    refused(source, f"{name} is torch.float32" if "up" in name else f"{name} is torch.float32 and", "give --dtype")
    assert not source.with_name(".target.converting").exists()
    to_sharded(source, tmp_path / "out", dtype=torch.bfloat16)
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors_of("tiny-moe-softmax")) == []


def test_a_padded_vocabulary_is_stripped_and_said(source, tmp_path):
    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(8, 64, dtype=torch.bfloat16)])

    notes = to_sharded(rewritten(source, change), tmp_path / "out")["notes"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"{name}: 8 rows below the vocabulary of 256 are padding" in notes
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors_of("tiny-moe-softmax")) == []


def test_more_rows_than_padding_are_another_vocabulary(tmp_path):
    config = config_of("tiny-dense")
    source = write(tmp_path / "source", tensors_of("tiny-dense"), config | {"vocab_size": 10})
    shape = "(expected [10, 64], found [256, 64])"
    refused(source, "2 tensors are of a wrong shape", f"{EMBEDDING} {shape}, {OUTPUT} {shape}")
    assert is_padding((126000, 8), (126464, 8)) and is_padding((150000, 8), (158191, 8))
    assert not is_padding((150000, 8), (158192, 8)) and not is_padding((256, 8), (264, 9))
    assert not is_padding((256, 8), (256, 8)) and not is_padding((256, 8), (255, 8))


def test_a_padded_vocabulary_of_a_sharded_checkpoint_is_stripped_and_said(source, tmp_path, monkeypatch):
    """As others' Megatron writes them: here the model of the manifest gets a smaller vocabulary than the weights."""
    from llada_megatron.parallel.checkpoint import manifest as manifests

    to_sharded(source, tmp_path / "out")
    step = tmp_path / "out/checkpoints/step-00000000"
    manifest = manifests.read(step)
    for model in (manifest.metadata["model"], manifest.metadata["run"]["model"]):
        model["vocab_size"] = 250
    manifests.write(step, manifest)
    notes = to_huggingface(tmp_path / "out", tmp_path / "exported")["notes"]
    assert "embedding.word_embeddings.weight: 6 rows below the vocabulary of 250 are padding" in notes
    expected = tensors_of("tiny-moe-softmax")
    found = read(tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["vocab_size"] == 250
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], expected[name][:250])


TIED = load_model("tiny-dense", ["tie_embeddings=true"])
EMBEDDING, OUTPUT = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


def test_a_stored_copy_of_tied_embeddings_is_left_out_and_said(tmp_path):
    tensors = tensors_of(TIED)
    assert OUTPUT not in tensors
    source = write(tmp_path / "source", tensors | {OUTPUT: tensors[EMBEDDING]}, config_of(TIED))
    summary = to_sharded(source, tmp_path / "out", "tensor_parallel=2,pipeline_parallel=2")
    assert f"{OUTPUT} is {EMBEDDING} again (the configuration ties them)" in summary["notes"]
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors) == []


@pytest.mark.parametrize(
    "change",
    [lambda copy: copy.index_fill(0, torch.tensor(255), 0), lambda copy: copy[:255], lambda copy: copy.float()],
    ids=["a row", "too short", "dtype"],
)
def test_another_output_layer_beside_tied_embeddings(tmp_path, change):
    tensors = tensors_of(TIED)
    source = write(tmp_path / "source", tensors | {OUTPUT: change(tensors[EMBEDDING])}, config_of(TIED))
    refused(source, "not of this model", f"{OUTPUT} (it differs from {EMBEDDING}, and the configuration ties them)")
