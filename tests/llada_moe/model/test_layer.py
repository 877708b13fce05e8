"""The short ways of evaluation: the values of Megatron's own path under every layout, and taken only there."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.tools.bench.layouts import DENSE_LAYOUTS, MODELS, MOE_LAYOUTS, parity_run
from tests.ranks import run_ranks

LAYOUTS = [
    *((model, LayoutConfig()) for model in MODELS),
    *(("dense", DENSE_LAYOUTS[name]) for name in ("TP2", "TP2.SP", "CP2")),
    *(("sigmoid", layout) for layout in (LayoutConfig(tensor_parallel=2), MOE_LAYOUTS["TP2.SP.ETP2"])),
    *(("softmax", MOE_LAYOUTS[name]) for name in ("EP2", "EP2 allgather")),
    ("blocks", MOE_LAYOUTS["EP2"]),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_equals_the_path_that_records_gradients(model, layout):
    assert all(apart <= 1e-6 for apart in run_ranks(difference, layout.world_size, MODELS[model], layout))


def difference(model: ModelConfig, layout: LayoutConfig) -> float:
    """Of logits with and without recorded gradients, relative to the largest; two segments and two sequences."""
    chunk, inputs, boundaries, rows = built(model, layout)
    chunk.eval()
    with torch.no_grad():
        direct = chunk(inputs, boundaries, rows=rows)
    recorded = chunk(inputs, boundaries, rows=rows)
    assert recorded.requires_grad
    assert direct.shape == recorded.shape
    return float((direct - recorded).abs().max() / recorded.abs().max())


def built(model: ModelConfig, layout: LayoutConfig):
    """A chunk with its initial weights, and `[2, 12]` inputs of this rank with some selected rows."""
    from llada_megatron.parallel import build, topology

    topology.initialize(layout, seed=0)
    chunk = build.build_run_chunks(parity_run(model, layout))[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, model.vocab_size, (2, 12), generator=generator)
    rows = torch.rand(2, 12, generator=generator) < 0.6
    boundaries = None if layout.context_parallel > 1 else torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    return chunk, inputs, boundaries, rows


def test_evaluation_alone_takes_the_short_way():
    assert run_ranks(paths_taken, 1, MODELS["blocks"]) == [{"evaluation": 0, "gradients": 3, "training": 3}]


def paths_taken(model: ModelConfig) -> dict[str, int]:
    """How many of Megatron's own forwards run: layer, attention and experts, each at least once or never."""
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    called: set[type] = set()
    with pytest.MonkeyPatch.context() as patch:
        for owner in (TransformerLayer, SelfAttention, MoELayer):
            patch.setattr(owner, "forward", noting(owner, called))
        chunk, inputs, boundaries, rows = built(model, LayoutConfig())

        def count(training: bool, gradients: bool) -> int:
            called.clear()
            with torch.set_grad_enabled(gradients):
                chunk.train(training)(inputs, boundaries, rows=rows)
            return len(called)

        return {
            "evaluation": count(training=False, gradients=False),
            "gradients": count(training=False, gradients=True),
            "training": count(training=True, gradients=False),  # the first pass of a recomputed layer
        }


def noting(owner: type, called: set[type]):
    real = owner.forward

    def forward(self, *args, **kwargs):
        called.add(owner)
        return real(self, *args, **kwargs)

    return forward


def test_no_row_selected_gives_no_logits():
    assert run_ranks(shape_of_nothing, 1, MODELS["dense"]) == [(0, MODELS["dense"].vocab_size)]


def shape_of_nothing(model: ModelConfig) -> tuple[int, ...]:
    chunk, inputs, boundaries, rows = built(model, LayoutConfig())
    with torch.inference_mode():
        return tuple(chunk.eval()(inputs, boundaries, rows=torch.zeros_like(rows)).shape)
