"""What cannot fit on its GPUs is refused before anything starts, with what would."""

from dataclasses import replace

import pytest

from llada_megatron.launch.gpu_memory import check_gpu_memory, sheet_of_memory
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu

RUN = load_run("llada-8b-pretrain")


def test_a_run_that_fits_is_not_mentioned():
    assert check_gpu_memory(RUN, load_gpu("h100")) is None


def test_a_run_that_cannot_fit_is_refused_with_the_change_that_does():
    larger = replace(RUN, training=replace(RUN.training, micro_batch_size=8))
    with pytest.raises(ResourceError, match=r"need about \d+.\d GiB of tensors each.*it would fit with training\."):
        check_gpu_memory(larger, load_gpu("h100"))


def test_a_run_that_leaves_too_little_is_warned_about():
    card = sheet_of_memory("a card", 50 * 2**30)
    assert "a card has 50.0 GiB" in check_gpu_memory(RUN, card)


def test_an_estimate_that_may_be_too_high_refuses_nothing():
    """Our own GPU needed 7 % less than was estimated."""
    needed = Estimate(RUN, load_gpu("h100"), Assumptions(imbalance=1.0)).worst.allocated
    assert check_gpu_memory(RUN, sheet_of_memory("a card", round(needed / 1.07))) is not None
    with pytest.raises(ResourceError):
        check_gpu_memory(RUN, sheet_of_memory("a card", round(needed / 1.12)))


def test_experts_are_taken_to_be_loaded_evenly():
    """What is refused must not be able to fit."""
    run = load_run("llada-moe-7b-a1b-pretrain")
    card = sheet_of_memory("a card", round(52.5 * 2**30))
    assert check_gpu_memory(run, card) is None
