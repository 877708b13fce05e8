"""The entropy of correct predictions: value and gradient. With the vocabulary sharded: test_fine_tuning_parity."""

import dataclasses
from types import SimpleNamespace

import torch

from llada_megatron.llada_moe.model import head
from llada_megatron.llada_moe.model.confidence import entropy_where_right


class Alone:
    """A group of one rank."""

    def size(self):
        return 1

    def rank(self):
        return 0


def example():
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 16, generator=draw)
    labels = torch.where(torch.arange(12) % 3 > 0, logits.argmax(1), torch.randint(16, (12,), generator=draw))
    return logits, labels, torch.rand(12, generator=draw)


def reference(logits, labels):
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1) * (logits.argmax(1) == labels)


def test_value_and_gradient_are_those_of_the_definition():
    logits, labels, factor = example()
    results = []
    for measure in (lambda z: entropy_where_right(z, labels, Alone()), lambda z: reference(z, labels)):
        leaf = logits.double().requires_grad_() if not results else logits.clone().requires_grad_()
        values = measure(leaf)
        (values * factor).sum().backward()
        results.append((values.detach().float(), leaf.grad.float()))
    (values, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    wrong = logits.argmax(1) != labels
    assert wrong.any() and not values[wrong].any() and not gradient[wrong].any() and (values[~wrong] > 0).all()


class Head:
    """What `supervised_loss` asks a model for; vocabulary 16, hidden 8."""

    def __init__(self):
        self.weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        self.output_layer = self
        self.output_size_per_partition = 16
        self.share_embeddings_and_output_weights = False
        self.pg_collection = SimpleNamespace(tp=Alone())
        self.config, self.training = None, True

    def __call__(self, rows, weight=None):
        return rows @ self.weight.t(), None


def test_the_loss_is_the_same_to_the_bit_beside_confidence_and_in_chunks(monkeypatch):
    def alone(config, logits, labels, group):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    monkeypatch.setattr(head, "cross_entropy", alone)
    hidden = torch.randn(10, 2, 8, generator=torch.Generator().manual_seed(2))
    labels = (hidden @ Head().weight.t()).argmax(2).t().contiguous()  # every one predicted right
    weights = torch.rand(2, 10, generator=torch.Generator().manual_seed(3)) * (torch.arange(10) % 3 > 0)
    targets = head.Targets.of(labels, weights)
    gradients, values = {}, {}
    for name, confidence, elements in (("alone", False, 10**6), ("beside", True, 10**6), ("chunked", True, 16 * 4)):
        model = Head()
        result = head.supervised_loss(model, hidden, dataclasses.replace(targets, confidence=confidence), elements)
        values[name] = result.detach()
        (result[0] if confidence else result).sum().backward()
        gradients[name] = model.weight.grad
    assert torch.equal(values["alone"], values["beside"][0]) and torch.equal(gradients["alone"], gradients["beside"])
    torch.testing.assert_close(values["chunked"], values["beside"])
    torch.testing.assert_close(gradients["chunked"], gradients["beside"])
    entropies = reference((hidden @ Head().weight.t()).flatten(0, 1), labels.t().flatten()).view(10, 2).t()
    torch.testing.assert_close(values["beside"][1], (entropies * (weights != 0)).sum(1).detach())
