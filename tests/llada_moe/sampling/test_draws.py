from __future__ import annotations

import torch

from llada_megatron.llada_moe.sampling import draws


def test_uniform_has_the_right_moments_and_no_correlation_between_neighbours():
    u = draws.uniform(1, draws.TOKEN, torch.arange(500)[:, None], torch.arange(400))
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.var() - 1 / 12) < 0.002
    centred = u - 0.5
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.001
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.001


def test_a_draw_depends_on_each_coordinate_and_on_nothing_else():
    whole = draws.uniform(3, draws.TOKEN, torch.arange(6)[:, None], torch.arange(50))
    part = draws.uniform(3, draws.TOKEN, torch.tensor([[4]]), torch.arange(20, 50))
    assert torch.equal(part[0], whole[4, 20:])
    assert not torch.equal(whole, draws.uniform(4, draws.TOKEN, torch.arange(6)[:, None], torch.arange(50)))
    assert not torch.equal(whole, draws.uniform(3, draws.GAP, torch.arange(6)[:, None], torch.arange(50)))
    swapped = draws.uniform(3, draws.TOKEN, torch.tensor(2), torch.tensor(1))
    assert swapped != draws.uniform(3, draws.TOKEN, torch.tensor(1), torch.tensor(2))
