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


def test_padding_for_fp8_adds_nothing_and_leaves_alone_what_the_fused_router_kept():
    [apart] = run_ranks(difference_by_padding, 1, MODELS["sigmoid"])
    assert apart <= 1e-6


class FusedRouter(torch.autograd.Function):
    """Keeps the choice for its backward pass, as Transformer Engine's kernel does."""

    @staticmethod
    def forward(ctx, weights, chosen):
        ctx.save_for_backward(chosen)
        ctx.mark_non_differentiable(kept := chosen.view_as(chosen))
        return weights.clone(), kept

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient * ctx.saved_tensors[0], None


def difference_by_padding(model: ModelConfig) -> float:
    """Of all gradients, relative to the largest of each parameter."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer

    chunk, inputs, boundaries, rows = built(model, LayoutConfig())
    mixtures = [module for module in chunk.modules() if isinstance(module, MoELayer)]
    counted = []

    def gradients() -> list[torch.Tensor]:
        parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
        loss = chunk(inputs, boundaries, rows=rows).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    plain = gradients()
    for mixture in mixtures:
        mixture.router.register_forward_hook(lambda _module, _inputs, output: FusedRouter.apply(*output))
        mixture.experts.register_forward_pre_hook(lambda _module, inputs: counted.append(inputs[1]))
        mixture.config.moe_router_padding_for_quantization = True
        assert mixture.token_dispatcher.config is mixture.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_dispatcher, "get_align_size_for_quantization", lambda _config: 8)
        padded = gradients()
    assert counted and all(int(count) % 8 == 0 for counts in counted for count in counts)
    pairs = [(a, b) for a, b in zip(plain, padded, strict=True) if a is not None]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) for a, b in pairs)
