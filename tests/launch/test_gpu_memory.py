"""What cannot fit on its GPUs is refused before anything starts, with what would."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.cli import main
from llada_megatron.launch import resources, train
from llada_megatron.launch.gpu_memory import check_gpu_memory, sheet_of_memory
from llada_megatron.launch.ranks.rank_info import RankInfo
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
    words = ["layout.expert_parallel=8", "training.micro_batch_size=4", "training.logits_chunk_mb=2048"]
    run = load_run("llada-moe-7b-a1b-pretrain", words)
    card = sheet_of_memory("a card", round(52.5 * 2**30))
    assert check_gpu_memory(run, card) is None


def test_a_run_in_fp8_is_never_refused():
    """Its memory was never held against a measurement."""
    words = ["training.fp8.recipe=blockwise", "training.micro_batch_size=8"]
    warning = check_gpu_memory(load_run("llada-8b-pretrain", words), load_gpu("h100"))
    assert "never held against a run in FP8" in warning


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_torchrun_refuses_as_well_and_rank_0_says_why(rank, monkeypatch, capsys, tmp_path):
    card = SimpleNamespace(name="a card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    for check in ("check_data", "check_weights", "check_space"):
        monkeypatch.setattr(resources, check, lambda run: None)
    monkeypatch.setattr(train, "_train_as_rank", lambda *_: pytest.fail("the run began"))
    variables = RankInfo("torchrun", rank, rank, RUN.layout.world_size, "here", 29500).environment()
    for name, value in (variables | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main(["train", "llada-8b-pretrain", "training.micro_batch_size=8", f"output_dir={tmp_path}/out"]) == 1
    error = capsys.readouterr().err
    assert (error.count("\n"), "GiB of tensors each" in error) == ((1, True) if rank == 0 else (0, False))
