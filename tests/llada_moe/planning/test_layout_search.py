"""Layouts for a number of GPUs, and the changes by which a run that does not fit would."""

import re
from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.planning.estimate import GIB, Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.llada_moe.planning.layout_search import (
    candidates,
    fewest_gpus,
    more_gpus,
    search,
    smallest_change,
    spread_over,
)

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


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llada-8b-pretrain", ["layout.tensor_parallel=1", "layout.sequence_parallel=false",
                               "layout.pipeline_parallel=2", "layout.pipeline_layers=[12,20]",
                               "layout.data_parallel=4"]),
        ("llada-moe-7b-a1b-pretrain", ["layout.expert_parallel=1", "layout.expert_tensor_parallel=2",
                                       "layout.data_parallel=8"]),
    ],
)  # fmt: skip
def test_a_change_of_the_layout_can_be_followed(name, keys):
    """Uneven stages and cut experts, which no layout of the search has, are taken back."""
    smallest = ["training.micro_batch_size=1", "training.recompute=full", "training.recompute_modules=[]"]
    estimate = Estimate(load_run(name, [*keys, *smallest]), H100, Assumptions())
    card = replace(H100, memory_gib=0.7 * estimate.card_bytes / GIB)
    change = smallest_change(replace(estimate, gpu=card))
    followed = Estimate(load_run(name, [*keys, *smallest, *re.findall(r"\S+=\S+", change)]), card, Assumptions())
    assert followed.fits and f"(then {followed.card_bytes / GIB:.1f} GiB)" in change
    assert ("layout.pipeline_layers=null" in change) == (name == "llada-8b-pretrain")


def test_a_search_in_fp8_has_nothing_that_fp8_forbids():
    run = load_run("llada-moe-7b-a1b-pretrain", ["training.fp8.recipe=delayed", "training.recompute=none",
                   "training.recompute_modules=[]"])  # fmt: skip
    modules = {tuple(each.training.recompute_modules) for each in candidates(run, 8, 8)}
    assert modules == {()}  # its maxima would count the second pass of moe_act


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


def test_where_no_change_fits_the_fewest_gpus_are_named():
    keys = ["training.micro_batch_size=1", "layout.data_parallel=2", "training.global_batch_size=60"]
    small = replace(H100, memory_gib=44.0)
    estimate = Estimate(load_run("llada-8b-pretrain", keys), small, Assumptions())
    said = more_gpus(estimate)
    gpus, overrides = int(re.search(r"are (\d+):", said).group(1)), re.findall(r"\S+=\S+", said)
    wider = load_run("llada-8b-pretrain", [*keys, *overrides])
    assert wider.layout.world_size == gpus > 4 and Estimate(wider, small, Assumptions()).fits
    leanest = [*keys, "training.recompute=full"]
    for data in (each for each in (2, 3, 4, 5, 6, 10, 12, 15, 20, 30) if 2 * each < gpus):
        run = load_run("llada-8b-pretrain", [*leanest, f"layout.data_parallel={data}"])
        assert not Estimate(run, small, Assumptions()).fits
    assert "no number of" in more_gpus(replace(estimate, gpu=replace(small, memory_gib=20.0)))
