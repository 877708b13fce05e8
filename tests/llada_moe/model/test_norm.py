"""RMSNorm on a CPU: PyTorch's values and gradients."""

from __future__ import annotations

import types

import pytest
import torch

from llada_megatron.llada_moe.model.norm import RMSNorm

CONFIG = types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)


@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 8), (3, 2, 4, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_equals_torch(shape, scale):
    torch.manual_seed(0)
    norm = RMSNorm(CONFIG, 8, eps=1e-5)
    norm.weight.data.uniform_(-2, 2)
    x, dy = scale * torch.randn(shape), torch.randn(shape)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(mine).backward(dy)
    weight = norm.weight.detach().clone().requires_grad_()
    torch.nn.functional.rms_norm(theirs, (8,), weight, 1e-5).backward(dy)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6 * float(theirs.grad.abs().max()))
    torch.testing.assert_close(norm.weight.grad, weight.grad)


def test_a_view_of_interleaved_heads_and_bf16_are_fine():
    norm = RMSNorm(CONFIG, 8)
    heads = torch.randn(3, 2, 24)[..., 8:16]
    torch.testing.assert_close(norm(heads), torch.nn.functional.rms_norm(heads, (8,), norm.weight, 1e-5))
    assert norm.to(torch.bfloat16)(heads.bfloat16()).dtype == torch.bfloat16


def test_megatron_is_told_to_sum_the_gradient_over_tensor_ranks():
    assert RMSNorm(CONFIG, 8).weight.sequence_parallel is True
