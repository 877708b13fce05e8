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


class Shard:
    """One of several tensor ranks, whose reductions find what the others gave in `given`."""

    def __init__(self, number, count, given):
        self.number, self.count, self.given = number, count, given

    def rank(self):
        return self.number

    def size(self):
        return self.count

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        parts = self.given.setdefault(op, {})
        parts[self.number] = tensor.clone()
        if len(parts) == self.count:
            stacked = torch.stack(list(parts.values()))
            tensor.copy_(stacked.amax(0) if op == torch.distributed.ReduceOp.MAX else stacked.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_what_a_gpu_computes_is_the_cross_entropy_of_the_whole_vocabulary(monkeypatch, dtype, shards):
    generator = torch.Generator().manual_seed(shards)
    whole = (5 * torch.randn(ROWS, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    reference = whole.float().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference, labels, reduction="none")
    (expected * weights).sum().backward()
    given = {}
    for _ in range(3):  # the maxima of all shards are known after the first round, the sums after the second
        results = []
        for number, part in enumerate(whole.chunk(shards, dim=1)):
            shard, logits = Shard(number, shards, given), part.clone().requires_grad_()
            monkeypatch.setattr(torch.distributed, "all_reduce", shard.all_reduce)
            losses = module.StreamedCrossEntropy.apply(logits, labels, shard)
            (losses * weights).sum().backward()
            results.append((losses, logits.grad))
    for losses, _ in results:
        torch.testing.assert_close(losses, expected)
    gradient = torch.cat([found for _, found in results], dim=1)
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient.float(), reference.grad, atol=1e-2 if dtype is torch.bfloat16 else 1e-6, rtol=0)


def test_a_gpu_reads_the_logits_as_they_are(monkeypatch):
    asked = []
    monkeypatch.setattr(module.StreamedCrossEntropy, "apply", lambda *given: asked.append(given) or "losses")
    logits = SimpleNamespace(is_cuda=True, unsqueeze=lambda _: None)
    assert cross_entropy(kernel(None), logits, torch.zeros(2, dtype=torch.long), "ranks") == "losses"
    assert asked[0][0] is logits and asked[0][2] == "ranks"


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
