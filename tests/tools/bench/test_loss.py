"""`llada bench loss` at a small size: less memory than all logits, the same numbers."""

from __future__ import annotations

import argparse

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
