"""The closed forms equal the models that Megatron builds, whole and rank by rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.model.parameters import count_parameters, rank_shares, stage_layers

PUBLISHED = {
    "llada-8b": 8_015_581_184,
    "llada-moe-7b-a1b": 7_356_880_896,
    "llada2-mini": 16_255_643_392,
    "llada2-flash": 102_889_705_216,
}
TENSOR2 = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS = [
    ("tiny-dense", [], {}),
    ("tiny-dense", [], {"tensor_parallel": 4, "sequence_parallel": True}),  # more ranks than key/value heads
    ("tiny-dense", [], {"pipeline_parallel": 2, "pipeline_chunks_per_rank": 2}),
    ("tiny-dense", [], {"pipeline_parallel": 2, "pipeline_layers": [3, 1]}),
    (
        "tiny-dense",
        ["num_layers=6"],
        {"pipeline_parallel": 2, "pipeline_chunks_per_rank": 2, "pipeline_layers": [1, 2, 2, 1]},
    ),
    ("tiny-dense", ["tie_embeddings=true"], {}),
    ("tiny-dense", ["tie_embeddings=true"], {**TENSOR2, "pipeline_parallel": 2}),
    ("tiny-moe", [], {**TENSOR2, "pipeline_parallel": 2, "expert_parallel": 2}),
    ("tiny-moe", [], {"context_parallel": 2, "expert_parallel": 2}),
    ("tiny-moe", [], {**TENSOR2, "data_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}),
    ("tiny-moe-softmax", [], {"pipeline_parallel": 4, "data_parallel": 2, "expert_parallel": 2}),
    ("small-moe", [], {"data_parallel": 2, "expert_parallel": 2}),
]
FLASH = {
    "tensor_parallel": 4,
    "sequence_parallel": True,
    "pipeline_parallel": 8,
    "data_parallel": 8,
    "expert_parallel": 32,
}


def build(cases: list[tuple[str, list[str], dict, int]]) -> list[dict]:
    """What each case's rank holds, from models built on the meta device in one other process."""
    text = json.dumps([dict(zip(("model", "overrides", "layout", "rank"), case, strict=True)) for case in cases])
    program = Path(__file__).with_name("meta_builds.py")
    done = subprocess.run([sys.executable, str(program)], input=text, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_published_models_have_exactly_the_published_parameters():
    built = build([(name, [], {}, 0) for name in PUBLISHED])
    for (name, published), found in zip(PUBLISHED.items(), built, strict=True):
        count = count_parameters(load_model(name))
        assert found["parameters"] + found["expert_bias"] == published == count.total
        assert found["parameters"] == count.trainable


def test_every_rank_holds_what_the_closed_form_says():
    cases = [(*case, rank) for case in LAYOUTS for rank in range(LayoutConfig(**case[2]).world_size)]
    cases += [("llada2-flash", [], FLASH, stage * 32 + 5) for stage in range(8)]
    for (name, overrides, layout, rank), found in zip(cases, build(cases), strict=True):
        shares = rank_shares(load_model(name, overrides), LayoutConfig(**layout))
        share = next(share for share in shares if rank in share.ranks)
        held = {"parameters": share.parameters, "layers": share.layers, "expert": share.expert}
        assert held == {key: found[key] for key in held}, (name, layout, rank)


@pytest.mark.parametrize(("name", "overrides", "layout"), LAYOUTS)
def test_the_groups_of_ranks_are_the_world_and_cover_every_layer(name, overrides, layout):
    model, layout = load_model(name, overrides), LayoutConfig(**layout)
    shares = rank_shares(model, layout)
    assert sorted(rank for share in shares for rank in share.ranks) == list(range(layout.world_size))
    stages = [stage_layers(model, layout, stage) for stage in range(layout.pipeline_parallel)]
    assert sorted(layer for stage in stages for layer in stage) == list(range(model.num_layers))


def test_active_parameters_are_those_that_the_reports_round():
    assert count_parameters(load_model("llada2-mini")).active == pytest.approx(1.43e9, rel=5e-3)
    assert count_parameters(load_model("llada2-flash")).active == pytest.approx(6.15e9, rel=5e-3)
    dense = count_parameters(load_model("llada-8b"))
    assert dense.active == dense.total
