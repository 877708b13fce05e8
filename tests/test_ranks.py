"""The helper that runs a function on several ranks."""

import os
import time

import pytest
import torch

from tests.ranks import RankFailure, run_ranks


def _sum(value):
    total = torch.tensor([float(value + torch.distributed.get_rank())])
    torch.distributed.all_reduce(total)
    return total


def _second_fails():
    if torch.distributed.get_rank() == 1:
        raise ValueError("the reason")
    torch.distributed.barrier()


def _second_hangs():
    if torch.distributed.get_rank() == 1:
        time.sleep(600)


def _second_dies():
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    torch.distributed.barrier()


def test_results_come_in_rank_order():
    assert [value.item() for value in run_ranks(_sum, 3, 10)] == [33.0, 33.0, 33.0]


def test_the_first_failure_is_told_with_its_stack():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2.*_second_fails.*the reason"):
        run_ranks(_second_fails, 2)


def test_a_dead_rank_is_named():
    with pytest.raises(RankFailure, match=r"rank 1 of 2:\ndied with exit code 7"):
        run_ranks(_second_dies, 2)


def test_the_time_limit_is_hard():
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"no answer from rank \[1\]"):
        run_ranks(_second_hangs, 2, timeout=3)
    assert time.monotonic() - began < 20
