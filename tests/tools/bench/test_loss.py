"""`llada bench loss` at a small size: less memory than all logits, the same numbers."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from llada_megatron.tools.bench import loss


def test_the_chunked_loss_needs_less_and_says_the_same():
    parser = argparse.ArgumentParser()
    loss.add_arguments(parser)
    args = parser.parse_args(
        ["--vocab", "8192", "--tokens", "1024", "--hidden", "32", "--chunk-mb", "2", "--repeats", "1"]
    )
    ratio, ours, full, difference, seconds = loss.run(args)
    assert ratio.holds and ratio.value < 0.25
    assert full.value >= 1024 * 8192 * 4 / 2**20 > ours.value
    assert difference.holds
    assert seconds.value > 0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("ours", [True, False])
def test_a_difference_that_meets_nan_holds_no_goal(place, ours):
    good, bad = ([torch.ones(4) for _ in range(3)] for _ in range(2))
    bad[place][1] = math.nan
    assert math.isnan(loss.largest_difference(*((bad, good) if ours else (good, bad))))
    assert loss.largest_difference(good, good) == 0.0
