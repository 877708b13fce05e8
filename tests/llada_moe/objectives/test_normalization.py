"""Normalisation: what each kind divides by, and that no split of the batch changes it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.objectives.normalization import NORMALIZATIONS, TokenCounts, count, normalizer

LENGTH = 16


def make_batch(seed, size):
    """A batch with random weights, untruncated and answer lengths; its first sequence has no masked token."""
    generator = torch.Generator().manual_seed(seed)
    untruncated = torch.randint(1, LENGTH + 1, (size,), generator=generator)
    ratio = torch.rand(size, generator=generator) * 0.9 + 0.1
    masked = torch.rand(size, LENGTH, generator=generator) < ratio[:, None]
    masked &= torch.arange(LENGTH)[None] < untruncated[:, None]
    masked[0] = False
    zeros = torch.zeros(size, LENGTH, dtype=torch.int64)
    answer = torch.minimum(untruncated, torch.randint(0, LENGTH, (size,), generator=generator))
    packed = torch.randint(1, 4, (size,), generator=generator)
    return Batch(zeros, zeros, masked / ratio[:, None], torch.zeros(1), ratio, untruncated, answer, packed)


def part(batch, rows):
    own = ("boundaries", "drafted")
    return Batch(**{name: x if name in own else x[rows] for name, x in vars(batch).items()})


def loss(kind, batch, cross_entropy, counts):
    sums = (batch.weights * cross_entropy).sum(1)
    return (normalizer(kind, counts, batch) * sums).double().sum() / (counts.sequences * LENGTH)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@given(seed=st.integers(0, 1000), size=st.integers(1, 9), cuts=st.sets(st.integers(1, 8)))
def test_any_split_gives_the_loss_of_the_whole(kind, seed, size, cuts):
    batch = make_batch(seed, size)
    cross_entropy = torch.rand(size, LENGTH, generator=torch.Generator().manual_seed(seed + 1))
    edges = [0, *sorted(c for c in cuts if c < size), size]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    counts = sum((count(part(batch, rows)) for rows in parts), TokenCounts())
    assert counts == count(batch)
    pieces = sum(loss(kind, part(batch, rows), cross_entropy[rows], counts) for rows in parts)
    torch.testing.assert_close(pieces, loss(kind, batch, cross_entropy, counts))


def test_what_each_divides_by():
    batch = make_batch(3, 6)
    cross_entropy = torch.rand(6, LENGTH)
    sums = (batch.weights * cross_entropy).sum(1).double()
    counts = count(batch)
    packed = int(batch.conversations.sum())
    assert counts == TokenCounts(6, int(batch.untruncated.sum()), int((batch.weights > 0).sum()), packed)
    expected = {
        "all_tokens": sums.sum() / batch.untruncated.sum(),
        "masked_tokens": sums.sum() / (batch.weights > 0).sum(),
        "conversations": sums.sum() / packed,
        "answer_length": torch.where(batch.answer > 0, sums / batch.answer.clamp(min=1), 0.0).mean(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(loss(kind, batch, cross_entropy, counts), value, rtol=1e-6, atol=0)


def test_what_is_supervised_with_weight_one_counts_as_well():
    """A token that is shown, where tokens are replaced, or one before a next token."""
    batch = make_batch(3, 6)
    masked = int((batch.weights > 0).sum())
    batch.weights[0] = 1.0
    assert count(batch).masked == masked + LENGTH


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_nothing_to_count_is_zero(kind):
    batch = make_batch(0, 2)
    batch.weights.zero_()
    batch.answer.zero_()
    factor = normalizer(kind, TokenCounts(2, 0, 0), batch)
    assert factor.shape == (2,) and factor.dtype == torch.float32 and (factor == 0).all()


def test_unknown_kind():
    with pytest.raises(ValueError, match="all_tokens"):
        normalizer("tokens", TokenCounts(1, 1, 1), make_batch(0, 1))
