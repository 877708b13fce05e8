"""`llada bench attention` at a small size: the same numbers as the loop over slices, and less written."""

from __future__ import annotations

import argparse

from llada_megatron import cli
from llada_megatron.tools.bench import attention


def test_more_documents_write_no_more_and_say_the_same(capsys):
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    size = ["--length", "256", "--documents", "32", "--heads", "2", "--head-dim", "8", "--block", "4", "--repeats", "1"]
    claims = attention.run(parser.parse_args([*size, "--half", "512", "--longest-half", "4096"]))
    *claims, time, memory, exact, linear, _, _ = claims
    assert len(claims) == 12
    assert time.value > 0 and 0 < memory.value < 1 and exact.holds and linear.holds
    for ratio, seconds, difference, ours, loop, speed in (claims[:6], claims[6:]):
        assert ratio.holds and difference.holds
        assert seconds.value > 0 and speed.value > 0
        assert loop.value > 5 * ours.value > 0
    said = capsys.readouterr().err
    assert all(f"{count:>5} documents:" in said for count in (1, 8, 32))
    assert "document by document (kernels for packed documents need CUDA); 256 positions, torch.float32" in said


def test_the_numbers_of_documents_are_powers_of_eight_up_to_the_most():
    assert attention._counts(512) == [1, 8, 64, 512]
    assert attention._counts(100) == [1, 8, 64, 100]
    assert attention._counts(1) == [1]


def test_documents_are_as_equal_as_they_can_be():
    assert attention.document_boundaries(10, 4).tolist() == [0, 2, 5, 8, 10]


def test_more_documents_than_positions_are_refused(capsys):
    assert cli.main(["bench", "attention", "--length", "256"]) == 2
    assert "--documents 512: a window of --length 256 holds 1 to 256" in capsys.readouterr().err
