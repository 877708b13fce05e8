"""What FP8 outside training refuses, and the layers that it leaves in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llada_megatron.llada_moe.config import load_run, to_dict
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.parallel.checkpoint import loaded_model
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.fp8 import fp8_inference

IN_BF16 = ["training.precision=bf16"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "kind", "text"),
    [
        ("tensorwise", IN_BF16, ResourceError, r"^fp8 \(recipe tensorwise\) needs a GPU.*; compute without FP8$"),
        ("tensorwise", [], ConfigError, "^fp8 tensorwise: this model is in fp32"),
        ("delayed", IN_BF16, ConfigError, "^fp8 delayed: one of blockwise, tensorwise"),
        ("tensorwize", IN_BF16, ConfigError, "tensorwise"),
        ("blockwise", [*IN_BF16, "model=tiny-dense"], ConfigError, "^fp8 blockwise: model.hidden_size: .* nearest"),
    ],
)
def test_fp8_is_refused_with_the_reason(recipe, overrides, kind, text):
    run = load_run("demo", ["model=small-moe", "layout={}", *overrides])
    with pytest.raises(kind, match=text):
        fp8_inference.require(recipe, run, LayoutConfig())


def test_a_damaged_checkpoint_is_passed_over_before_its_model_is_looked_at(tmp_path, monkeypatch, capsys):
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-1").mkdir()
    manifests.write(tmp_path / "step-1", manifests.Manifest({"run": to_dict(load_run("demo"))}, {}))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ConfigError, match="^fp8 tensorwise: this model is in fp32"):
        loaded_model._load_first([tmp_path / "step-2", tmp_path / "step-1"], LayoutConfig(), None, "tensorwise")
    assert "passed over a damaged checkpoint" in capsys.readouterr().err


def test_layers_that_were_trained_in_bf16_stay_in_it():
    training = load_run("demo", IN_BF16).training
    plain = fp8_inference.training_keys("tensorwise", training).fp8
    assert plain == FP8Config(recipe="tensorwise", param_gather=True)
    trained = replace(training, fp8=FP8Config(recipe="blockwise", num_layers_at_end_in_bf16=2))
    kept = fp8_inference.training_keys("tensorwise", trained).fp8
    assert (kept.num_layers_at_start_in_bf16, kept.num_layers_at_end_in_bf16) == (0, 2)
