from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.data.batch import Batch, collate
from llada_megatron.llada_moe.diffusion.noise import ForwardProcess, SampleCoordinates
from llada_megatron.llada_moe.evaluation import infilling, likelihood
from llada_megatron.llada_moe.objectives.masked_diffusion import diffusion_row

VOCAB, MASK, EOS, LENGTH = 12, 3, 2, 8


class Windows:
    """Stands for TrainingData(split="validation"): given rows under the real noise of validation."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        band = ObjectiveConfig(mask_ratio_min=0.4, mask_ratio_max=0.5, random_length_probability=0.5)  # must not matter
        self.noise = ForwardProcess(band, seed=7, global_batch_size=16, split="validation")

    def batch(self, numbers) -> Batch:
        edges = np.array([0, self.rows.shape[1]], np.int32)
        return collate(
            [
                diffusion_row(
                    self.rows[n], edges, self.noise.corrupt(SampleCoordinates(n, 0, 0, n), self.rows.shape[1]), MASK
                )
                for n in numbers
            ]
        )


def loss_of(log_probabilities):
    def loss(batch: Batch) -> torch.Tensor:
        chosen = log_probabilities(batch).gather(2, batch.labels[..., None]).squeeze(2)
        return -(batch.weights * chosen.nan_to_num(neginf=0.0)).sum(1)

    return loss


def test_bound_of_independent_tokens_is_their_entropy():
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(VOCAB))
    data = Windows(generator.choice(VOCAB, size=(4096, LENGTH), p=p))
    table = torch.tensor(p).log()
    found = likelihood.measure(loss_of(lambda b: table.expand(*b.labels.shape, -1)), data, range(4096), 512)
    entropy = -(p * np.log2(p)).sum()
    assert found.tokens == 4096 * LENGTH
    assert found.sequences == 4096
    assert found.bits_per_token == pytest.approx(entropy, rel=0.02)


def test_bound_of_dependent_tokens_is_their_joint_entropy():
    """Eight copies of one uniform token: log2(VOCAB) bits for the whole sequence, under the exact posterior."""
    data = Windows(np.repeat(np.random.default_rng(1).integers(4, VOCAB, 8192)[:, None], LENGTH, axis=1))

    def posterior(batch: Batch) -> torch.Tensor:
        visible = (batch.weights == 0).any(1)[:, None, None]
        known = torch.nn.functional.one_hot(batch.labels, VOCAB).double().log()
        uniform = torch.full_like(known, -math.log(VOCAB - 4))
        return torch.where(visible, known, uniform)

    found = likelihood.measure(loss_of(posterior), data, range(8192), 1024)
    assert found.bits_per_token * LENGTH == pytest.approx(math.log2(VOCAB - 4), rel=0.05)


def test_every_validation_sees_the_same_masks_and_ranks_add_up():
    data = Windows(np.random.default_rng(2).integers(4, VOCAB, (40, LENGTH)))
    table = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    loss = loss_of(lambda b: table.expand(*b.labels.shape, -1))
    whole = likelihood.measure(loss, data, range(40), 16)
    again = likelihood.measure(loss, data, range(40), 7)
    ranks = sum((likelihood.measure(loss, data, range(r, 40, 3), 5) for r in range(3)), likelihood.Likelihood())
    for other in (again, ranks):
        assert other.nats == pytest.approx(whole.nats, rel=1e-6)
        assert (other.tokens, other.sequences) == (whole.tokens, whole.sequences)


def test_bits_per_byte_by_hand():
    cost = likelihood.Likelihood(nats=6 * math.log(2), tokens=4, sequences=1)
    assert cost.bits_per_token == pytest.approx(1.5)
    assert cost.bits_per_byte(3.0) == pytest.approx(0.5)
    assert math.isnan(likelihood.Likelihood().bits_per_token)


def test_infilling_counts_right_tokens_and_the_best_constant_guess():
    rows = np.random.default_rng(3).integers(4, VOCAB, (64, 50))
    rows[:, ::2] = 7

    def perfect(tokens, gaps, boundaries):
        truth = torch.from_numpy(rows[offset["now"] : offset["now"] + len(tokens)])
        assert (tokens[gaps] == MASK).all()
        assert torch.equal(tokens[~gaps], truth[~gaps])
        offset["now"] += len(tokens)
        logits = torch.nn.functional.one_hot(truth[gaps], VOCAB).float()
        logits[:, MASK] = 5.0  # the mask itself is no answer
        return logits

    offset = {"now": 0}
    found = infilling.measure(perfect, Windows(rows), MASK, range(64), 10)
    assert found.gaps == pytest.approx(0.15 * rows.size, rel=0.1)
    assert found.accuracy == 1.0
    assert found.majority_share == pytest.approx((rows == 7).mean(), abs=0.05)

    def constant(tokens, gaps, boundaries):
        logits = torch.zeros(int(gaps.sum()), VOCAB)
        logits[:, 7] = 1.0
        return logits

    found = infilling.measure(constant, Windows(rows), MASK, range(64), 10)
    assert found.right == found.majority
    assert infilling.measure(constant, Windows(rows), MASK, range(64), 64).gaps == found.gaps
