"""A weight that is NaN or infinite is an error that names its tensor: in import, export, verify and sampling."""

import json
from types import SimpleNamespace

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.finite import first_not_finite, is_finite
from llada_megatron.parallel.sampling.not_finite import _first_weight
from llada_megatron.parallel.sampling.sampler import Sampler
from llada_megatron.tools.convert import importer
from tests.tools.convert.checkpoints import config_of, tensors_of, to_huggingface, to_sharded, write, written

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
CASES = [
    ("tiny-dense", "model.transformer.blocks.1.k_proj.weight", (17, 3), torch.nan, "nan"),
    ("tiny-dense", "model.transformer.ff_out.weight", (200, 0), -torch.inf, "-inf"),
    ("tiny-moe", EXPERT, (3, 7), torch.inf, "inf"),
    ("tiny-moe", "model.layers.1.mlp.gate.expert_bias", (6,), torch.nan, "nan"),
]


def spoilt(directory, model, name, position, value, dtype="bf16"):
    """A checkpoint with one weight that is no number."""
    tensors = dict(tensors_of(model, dtype))
    tensors[name] = tensors[name].clone()
    tensors[name][position] = value
    return write(directory, tensors, config_of(model))


def spoilt_shards(root, monkeypatch, model="tiny-dense"):
    """What an import would have made of such a checkpoint had it not looked."""
    source = spoilt(root / "source", model, "model.transformer.ln_f.weight", (5,), torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(importer, "require_finite", lambda *_: None)
        to_sharded(source, root / "sharded")
    return root / "sharded"


@pytest.mark.parametrize(("model", "name", "position", "value", "text"), CASES)
def test_an_import_names_the_tensor(tmp_path, model, name, position, value, text):
    source = spoilt(tmp_path / "source", model, name, position, value)
    with pytest.raises(CheckpointError) as caught:
        to_sharded(source, tmp_path / "sharded")
    assert f"{source}: not every weight is a finite number: {name} is {text} at {list(position)}." in str(caught.value)
    assert not (tmp_path / "sharded").exists()


def test_a_weight_too_large_for_the_written_dtype(tmp_path):
    name = "model.transformer.ln_f.weight"
    source = spoilt(tmp_path / "source", "tiny-dense", name, (2,), torch.finfo(torch.float32).max, "fp32")
    to_sharded(source, tmp_path / "kept")
    with pytest.raises(CheckpointError, match=rf"{name} is inf at \[2\]"):
        to_sharded(source, tmp_path / "rounded", dtype=torch.bfloat16)


def test_an_export_and_a_sampler_name_the_tensor(tmp_path, monkeypatch):
    shards = spoilt_shards(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight is nan at \[5\]"):
        to_huggingface(shards, tmp_path / "published", without_tokenizer=True)
    told = r"logits are not finite.*final_layernorm\.weight is nan at \[5\]"
    with Sampler.open(shards, max_new_tokens=4) as sampler, pytest.raises(CheckpointError, match=told):
        sampler.generate([[5, 6, 7]])


def test_a_weight_has_the_name_that_it_has_in_the_whole_model():
    model = SimpleNamespace(decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=5)]))
    model.named_parameters = lambda: [("decoder.layers.0.mlp.router.weight", torch.tensor([0.0, torch.nan]))]
    model.named_buffers = list
    assert _first_weight(model) == "decoder.layers.4.mlp.router.weight is nan at [1]"
    model.named_parameters = lambda: [("embedding.word_embeddings.weight", torch.tensor([torch.inf]))]
    assert _first_weight(model) == "embedding.word_embeddings.weight is inf at [0]"
    model.named_parameters = list
    assert _first_weight(model) is None


def test_finite_weights_whose_logits_are_not(tmp_path):
    tensors = dict(tensors_of("tiny-dense", "fp32"))
    tensors |= {
        name: tensors[name] * 1e38 for name in ("model.transformer.ln_f.weight", "model.transformer.ff_out.weight")
    }
    to_sharded(write(tmp_path / "source", tensors, config_of("tiny-dense")), tmp_path / "sharded")
    told = r"The weights of this replica are finite.*beyond torch\.float32"
    with Sampler.open(tmp_path / "sharded", max_new_tokens=4) as sampler, pytest.raises(CheckpointError, match=told):
        sampler.generate([[5, 6, 7]])


def test_verify_fails_on_them_in_either_checkpoint(capsys, tmp_path):
    whole = written(tmp_path / "whole", "tiny-moe")
    nan = spoilt(tmp_path / "nan", *CASES[2][:4])

    def verify(a, b, *options):
        code = cli.main(["convert", "verify", str(a), str(b), *options, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    fault = f"{nan}: {EXPERT} is inf at [3, 7]"
    for a, b in ((nan, nan), (nan, whole), (whole, nan)):
        for options in (("--no-logits",), ("--no-logits", "--tolerance", "1000")):
            code, report = verify(a, b, *options)
            assert code == 1 and not report["equal"]
            assert report["not_finite"] == [fault] * (2 if a == b else 1)
            assert f"not equal: not every weight is a finite number: {fault}" in report["lines"][-1]
    assert verify(whole, whole, "--no-logits")[1]["not_finite"] == []


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *(
            (dtype, value)
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
            for value in (torch.nan, torch.inf)
        ),
        (torch.bfloat16, -torch.inf),
        (torch.float8_e4m3fn, torch.nan),
    ],
)
def test_the_first_one_is_found(dtype, value, monkeypatch):
    monkeypatch.setattr("llada_megatron.llada_moe.finite._CHUNK", 7)
    whole = torch.zeros(4, 5, dtype=dtype)
    assert is_finite(whole) and first_not_finite(whole) is None
    wrong = whole.float()
    wrong[2, 3] = wrong[3, 1] = value
    wrong = wrong.to(dtype)
    position, found = first_not_finite(wrong)
    assert not is_finite(wrong) and position == (2, 3) and (found != found) == bool(wrong[2, 3].isnan())


def test_what_has_no_such_values():
    assert is_finite(torch.zeros(3, dtype=torch.int64)) and is_finite(torch.zeros(0))
    assert is_finite(torch.full((2,), 1e300, dtype=torch.float64))
