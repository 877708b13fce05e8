"""The kernels that the loss can be computed by: each is asked in its own way, and Megatron's configuration decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.model import cross_entropy as module
from llada_megatron.llada_moe.model.cross_entropy import cross_entropy
from tests import te_stub
from tests.llada_moe.model.test_experts import one_rank  # noqa: F401

ROWS, VOCABULARY = 5, 32


def kernel(name):
    return SimpleNamespace(cross_entropy_loss_fusion=name is not None, cross_entropy_fusion_impl=name or "native")


def outcome(name, dtype):
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    # Megatron's own computes in the logits' place
    losses = cross_entropy(kernel(name), logits * 1, labels, parallel_state.get_tensor_model_parallel_group())
    losses.sum().backward()
    torch.testing.assert_close(losses, expected)
    return losses, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_gives_the_same_loss_and_gradient(monkeypatch, dtype):
    asked = []

    def engine(logits, labels, group, is_cg_capturable=False):
        """As Megatron's wrapper calls Transformer Engine's."""
        te_stub.signature("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy").bind(
            logits, labels, 0.0, False, group, -100, is_cg_capturable
        )
        asked.append((logits.dtype, tuple(logits.shape), tuple(labels.shape)))
        return torch.nn.functional.cross_entropy(logits[:, 0].float(), labels[:, 0], reduction="none")[:, None]

    monkeypatch.setattr(module.engine, "te_parallel_cross_entropy", engine, raising=False)
    plain = outcome(None, dtype)
    for name in ("native", "te"):
        losses, gradient = outcome(name, dtype)
        torch.testing.assert_close(losses, plain[0])
        torch.testing.assert_close(gradient, plain[1], atol=1e-2, rtol=1e-2)  # the compiled one's gradient is bfloat16
    assert asked == [(dtype, (ROWS, 1, VOCABULARY), (ROWS, 1))]
