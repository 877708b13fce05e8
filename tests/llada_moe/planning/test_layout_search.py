"""Layouts for a number of GPUs, and the changes by which a run that does not fit would."""

import re
from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.llada_moe.planning.layout_search import fewest_gpus, search, smallest_change, spread_over

H100 = load_gpu("h100")
SMALL = replace(H100, memory_gib=24.0)
RUN = load_run("llada-moe-7b-a1b-pretrain", ["training.global_batch_size=256"])


def test_a_search_ranks_what_fits_and_says_why_others_fall():
    found = search(RUN, 8, SMALL, Assumptions())
    assert found.ranked and found.too_large and found.refused
    times = [each.time.total for each in found.ranked]
    assert times == sorted(times) and all(each.fits for each in found.ranked)
    assert not any(each.fits for each in found.too_large)
    assert {each.run.layout.world_size for each in (*found.ranked, *found.too_large)} == {8}
    assert {each.run.training.global_batch_size for each in found.ranked} == {256}  # the same mathematics


def test_the_smallest_change_is_one_that_fits():
    run = load_run("llada-8b-pretrain", ["training.micro_batch_size=8"])
    estimate = Estimate(run, H100, Assumptions())
    assert not estimate.fits
    change = smallest_change(estimate)
    overrides = re.findall(r"\S+=\S+", change)
    assert Estimate(
        load_run("llada-8b-pretrain", ["training.micro_batch_size=8", *overrides]), H100, Assumptions()
    ).fits


def test_no_change_fits_on_a_card_that_is_too_small():
    estimate = Estimate(load_run("llada-8b-pretrain"), replace(H100, memory_gib=6.0), Assumptions())
    assert smallest_change(estimate) is None


def test_the_fewest_gpus_that_would_do():
    needed = fewest_gpus(RUN, SMALL, Assumptions(), 1)
    assert needed == 8 or (needed < 8 and not search(RUN, needed // 2, SMALL, Assumptions()).ranked)
    assert search(RUN, needed, SMALL, Assumptions()).ranked


def test_another_number_of_gpus_is_more_data_parallel_ranks():
    run = load_run("llada2-flash-pretrain")
    assert spread_over(run, 256).layout.data_parallel == 64
    assert spread_over(run, 512) is run
    with pytest.raises(ConfigError, match=r"--gpus 50: the layout takes a multiple of 4 GPUs .*; use 48 or 52"):
        spread_over(run, 50)
    with pytest.raises(ConfigError, match=r"--gpus 12: with layout.data_parallel 3, layout.expert_parallel"):
        spread_over(run, 12)
