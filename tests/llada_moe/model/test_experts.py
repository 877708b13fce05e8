"""The routed experts in one operation: SequentialMLP's values and gradients, and its parameters."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.parallel import device

device.install()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.config.model import (  # noqa: E402
    ModelConfig,
    MoEConfig,
)
from llada_megatron.llada_moe.model.experts import PermutedExperts  # noqa: E402
from llada_megatron.llada_moe.model.transformer import build_model  # noqa: E402
from llada_megatron.parallel import topology  # noqa: E402
from llada_megatron.parallel.build import transformer_config  # noqa: E402

EXPERTS, HIDDEN = 4, 32
MODEL = ModelConfig(
    family="llada_moe", num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=64, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, vocab_size=64, max_sequence_length=16, mask_token_id=3, eos_token_id=2,
    moe=MoEConfig(num_experts=EXPERTS, top_k=2, expert_ffn_hidden_size=24),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


def make(cls):
    torch.manual_seed(0)
    config = transformer_config(MODEL, LayoutConfig())
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return cls(EXPERTS, config, submodules, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def outcome(experts, counts, dtype):
    generator = torch.Generator().manual_seed(1)
    experts = experts.to(dtype)
    x = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    target = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
    y, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None
    (y * target).sum().backward()
    return {"y": y, "x": x.grad, "probs": probs.grad, **{n: p.grad for n, p in experts.named_parameters()}}


@pytest.mark.parametrize("counts", [[3, 5, 1, 7], [0, 9, 0, 2], [4, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_equals_sequential_mlp(counts, dtype, tolerance):
    ours = outcome(make(PermutedExperts), counts, dtype)
    theirs = outcome(make(SequentialMLP), counts, dtype)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = float(value.float().abs().max()) if value.numel() else 1.0
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(ours[name], value, atol=tolerance * max(scale, 1e-6), rtol=0)


def test_checkpoint_is_that_of_sequential_mlp():
    ours, theirs = (make(cls).sharded_state_dict(prefix="mlp.experts.") for cls in (PermutedExperts, SequentialMLP))
    assert {k: (v.key, v.global_shape, v.global_offset) for k, v in ours.items() if hasattr(v, "global_shape")} == {
        k: (v.key, v.global_shape, v.global_offset) for k, v in theirs.items() if hasattr(v, "global_shape")
    }
    assert ours.keys() == theirs.keys()


def test_the_model_is_built_from_them():
    model = build_model(MODEL, transformer_config(MODEL, LayoutConfig()))
    assert type(model.decoder.layers[0].mlp.experts) is PermutedExperts
