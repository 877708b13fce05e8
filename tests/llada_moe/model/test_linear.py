"""Parallel linear layers in evaluation: Megatron's values, and its path wherever there is more than a product."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import DENSE
from tests.ranks import run_ranks

LAYOUTS = [
    LayoutConfig(),
    LayoutConfig(tensor_parallel=2),
    LayoutConfig(tensor_parallel=2, sequence_parallel=True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_megatron(layout, bias):
    assert run_ranks(outcomes, layout.world_size, layout, bias) == [{"equal": True, "same state": True}] * (
        layout.world_size
    )


def outcomes(layout: LayoutConfig, bias: bool) -> dict[str, bool]:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from llada_megatron.llada_moe.model.linear import ColumnLinear, RowLinear, torchs_own
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.build import transformer_config

    topology.initialize(layout, seed=0)
    config = transformer_config(DENSE, layout)
    common = {"config": config, "init_method": torch.nn.init.normal_, "bias": bias, "skip_bias_add": False}
    pairs = (
        (ColumnLinear, ColumnParallelLinear, {"gather_output": False}, 8),
        (ColumnLinear, ColumnParallelLinear, {"gather_output": not layout.sequence_parallel}, 8),
        (RowLinear, RowParallelLinear, {"input_is_parallel": True}, 8 // layout.tensor_parallel),
    )
    results = {"equal": True, "same state": True}
    for ours, theirs, options, width in pairs:
        mine, reference = ours(8, 4, **common, **options).eval(), theirs(8, 4, **common, **options).eval()
        results["same state"] &= mine.state_dict().keys() == reference.state_dict().keys()
        reference.load_state_dict(mine.state_dict())
        x = torch.randn(6, 2, width)
        if options.get("input_is_parallel") is None and not layout.sequence_parallel and layout.tensor_parallel > 1:
            torch.distributed.broadcast(x, src=0)
        with torch.inference_mode(), torchs_own():
            results["equal"] &= torch.equal(mine(x)[0], reference(x)[0])
    return results


def test_weight_given_at_call():
    assert run_ranks(with_given_weight, 1) == [True]


def with_given_weight() -> bool:
    from llada_megatron.llada_moe.model.linear import ColumnLinear, torchs_own
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.build import transformer_config

    topology.initialize(LayoutConfig(), seed=0)
    layer = ColumnLinear(
        8,
        4,
        config=transformer_config(DENSE, LayoutConfig()),
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_weight_param_allocation=True,
    ).eval()
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.inference_mode(), torchs_own():
        return torch.equal(layer(x, weight)[0], x @ weight.t())
