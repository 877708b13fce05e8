"""Noise on the embeddings of masked tokens: normal, where a mask is and nowhere else, the same however it is cut."""

import torch

from llada_megatron.llada_moe.data.packing import mix
from llada_megatron.llada_moe.model.context_slices import Run, held_runs, in_order, taken
from llada_megatron.llada_moe.model.mask_noise import MaskNoise, _mixed, _signed, standard_normal
from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern

MASK, SEQ, HIDDEN = 3, 8, 16
WHOLE = (Run(0, SEQ),)
TOKENS = torch.tensor([[3, 5, 3, 3, 7, 8, 3, 9], [5, 3, 6, 7, 8, 3, 3, 3]])


def noise(std=0.5, seed=1, samples=(4, 5), runs=WHOLE):
    return MaskNoise.of(std, seed, samples, MASK, runs, torch.device("cpu"))


def added(of, tokens=TOKENS, part=0, rows=SEQ):
    return of.add(torch.zeros(rows, tokens.size(0), HIDDEN), tokens, part)


def test_the_hash_is_that_of_the_data_order():
    words = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    assert _mixed(torch.tensor([_signed(word) for word in words])).tolist() == [_signed(mix(word)) for word in words]


def test_draws_are_standard_normal_and_not_correlated():
    drawn = standard_normal(torch.arange(200_000)).double()
    assert abs(drawn.mean()) < 4 / 200_000**0.5 and abs(drawn.std() - 1) < 4 / 400_000**0.5
    assert abs((drawn.abs() < 1).double().mean() - 0.6827) < 0.005 and drawn.abs().max() < 6
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / 200_000**0.5
    assert drawn.isfinite().all()


def test_only_masked_tokens_are_touched():
    found = added(noise())
    masked = (TOKENS == MASK).t()
    assert (found[masked] != 0).all() and not found[~masked].any()
    assert 0.35 < float(found[masked].std()) < 0.65


def test_a_draw_depends_on_seed_sample_and_position_and_on_nothing_else():
    whole = added(noise())
    assert torch.equal(added(noise(samples=(5,)), TOKENS[1:]), whole[:, 1:])
    assert not torch.equal(added(noise(seed=2)), whole) and not torch.equal(added(noise(samples=(6, 7))), whole)
    assert torch.equal(added(noise(std=1.0)), 2 * whole)


def test_ranges_of_positions_get_what_the_whole_gets():
    whole = added(noise())
    for pattern in (FULL, AttentionPattern(1, doubled=True)):  # context ranks
        held = [held_runs(SEQ, rank, 2, pattern) for rank in range(2)]
        parts = [added(noise(runs=runs), taken(TOKENS, runs, dim=1), rows=4) for runs in held]
        assert torch.equal(in_order(torch.cat(parts), 2, pattern), whole)
    quarters = [added(noise(), part=part, rows=2) for part in range(4)]  # ranks of sequence parallelism
    assert torch.equal(torch.cat(quarters), whole)
