"""`llada plan` in the test's own process: what it prints, its exit codes, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.fp8 import WIDTH_MULTIPLE, FP8Config
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import GPUS, load_gpu
from llada_megatron.llada_moe.planning.layout_search import Found
from llada_megatron.parallel.fp8.recipes import obstacle
from llada_megatron.tools.plan.report import assumptions, search_table

MOE = "llada-moe-7b-a1b-pretrain"


def refused(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_a_plan_says_memory_messages_time_and_what_it_assumes(capsys):
    assert main(["plan", "small-diffusion", "--gpus", "2", "--json", "layout.tensor_parallel=2",
                 "layout.data_parallel=1"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    for word in ("fits:", "memory of a rank", "with each recomputation", "messages of a rank", "time of a step",
                 "GPU-hours", "assumed", "counted in the model built on the meta device"):  # fmt: skip
        assert word in text
    values = json.loads(text.splitlines()[-1])
    stage = values["stages"][0]
    assert stage["allocated_bytes"] == pytest.approx(sum(stage["bytes"].values()))
    assert values["step_s"] == pytest.approx(sum(values["step_parts_s"].values()))
    assert {each["axis"] for each in values["messages"]} == {"tensor"}


def test_a_plan_that_does_not_fit_says_what_would(capsys):
    assert main(["plan", "small-diffusion", "--gpu", "a100", "training.micro_batch_size=16384",
                 "training.global_batch_size=16384", "layout.data_parallel=1"]) == 1  # fmt: skip
    assert re.search(r"DOES NOT FIT: .* it fits with training\.micro_batch_size=\d+", capsys.readouterr().out)


def test_what_of_a_layout_is_planned_as_something_else_is_said():
    layout = LayoutConfig(tensor_parallel=8, sequence_parallel=True, expert_dispatcher="allgather")
    run = replace(load_run("llada2-mini-pretrain"), layout=layout)
    text = assumptions(Estimate(run, load_gpu("h100"), Assumptions()))
    assert "layout.expert_dispatcher allgather is planned as alltoall" in text
    assert "tensor 8 is more than the 4 key heads" in text
    plain = assumptions(Estimate(replace(run, layout=LayoutConfig()), load_gpu("h100"), Assumptions()))
    assert "alltoall" not in plain and "key heads" not in plain and "FP8" not in plain
    fp8 = replace(run, training=replace(run.training, fp8=FP8Config(recipe="delayed")))
    assert "experts gain from FP8" in assumptions(Estimate(fp8, load_gpu("h100"), Assumptions()))


def test_a_search_says_what_of_the_layout_it_takes_back():
    run = load_run(MOE, ["layout.pipeline_parallel=2", "layout.pipeline_layers=[7,9]"])
    found = Found([Estimate(run, load_gpu("h100"), Assumptions())], [])
    assert "\nall of them with layout.pipeline_layers=null" in search_table(found, 1, run)
    assert "all of them" not in search_table(found, 1, load_run(MOE))


def test_a_search_shows_the_best_layouts(capsys):
    assert main(["plan", MOE, "--gpus", "8", "--search", "--top", "3", "training.global_batch_size=256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ layouts, \d+ fit", lines[0])
    assert sum("TP" in line and "DP" in line for line in lines[2:5]) == 3
    assert any("do not fit; the smallest of them needs" in line for line in lines)


def test_a_search_in_vain_names_the_fewest_gpus_that_would_do(capsys, tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text(
        "name: card\nmemory_gib: 20\nbf16_tflops: 300\nmemory_gb_per_s: 2000\n"
        "link_gb_per_s: 300\nnetwork_gb_per_s: 25\n"
    )
    assert main(["plan", MOE, "--gpus", "2", "--gpu", str(card), "--search", "training.global_batch_size=64",
                 "training.micro_batch_size=1"]) == 1  # fmt: skip
    assert re.search(r"no layout of 2 x card fits: .* the fewest GPUs that would are \d+", capsys.readouterr().err)


def test_measured_loads_are_told_and_felt(capsys, tmp_path):
    moe = load_run(MOE).model.moe
    tokens = [2000, *[100] * (moe.num_experts - 1)]
    file = tmp_path / "profile.json"
    values = {
        "schema": 1,
        "model": {},
        "experts": moe.num_experts,
        "top_k": moe.top_k,
        "layers": {str(n): {"tokens": tokens} for n in range(1, 17)},
    }
    file.write_text(json.dumps(values))
    few = ("--gpus", "8", "--search", "--top", "1", "training.global_batch_size=256", "--json")
    assert main(["plan", MOE, *few, "--profile", str(file)]) == 0
    best = json.loads(capsys.readouterr().out.splitlines()[-1])["best"][0]
    assert best["assumed"]["profile"] == str(file) and len(best["assumed"]["layer_imbalance"]) == 16
    assert best["layout"]["expert_parallel"] == 1  # with one expert of every layer that full, to cut them costs most
    with pytest.raises(SystemExit):
        main(["plan", MOE, "--profile", str(file), "--imbalance", "2"])
    assert "not allowed with" in capsys.readouterr().err


def test_wrong_input_is_one_line(capsys):
    assert "no GPU 'h10'; did you mean 'h100'?" in refused(capsys, MOE, "--gpu", "h10")
    assert "--gpus 0: at least 1" in refused(capsys, MOE, "--gpus", "0")
    assert "--imbalance 0.5: a number of at least 1" in refused(capsys, MOE, "--imbalance", "0.5")
    assert "--imbalance nan" in refused(capsys, MOE, "--imbalance", "nan")
    assert "use 48 or 52" in refused(capsys, "llada2-flash-pretrain", "--gpus", "50")
    assert "no layout divides them" in refused(capsys, "llada-8b-pretrain", "--gpus", "7919", "--search")


def test_fp8_that_the_gpu_cannot_run_is_refused(capsys, tmp_path):
    fp8 = "llada-8b-pretrain", "training.recompute=none"
    wrong = refused(capsys, *fp8, "training.fp8.recipe=mxfp8", "--gpu", "h100")
    assert "training.fp8.recipe: mxfp8 cannot run on H100 SXM 80 GB (--gpu h100): " in wrong
    assert "use recipe delayed or tensorwise or blockwise, or remove training.fp8" in wrong
    assert "needs compute capability 8.9" in refused(capsys, *fp8, "training.fp8.recipe=tensorwise", "--gpu", "a100")
    card = tmp_path / "card.yaml"
    card.write_text(
        "name: card\nmemory_gib: 80\nbf16_tflops: 300\nmemory_gb_per_s: 2000\n"
        "link_gb_per_s: 300\nnetwork_gb_per_s: 25\n"
    )
    wrong = refused(capsys, *fp8, "training.fp8.recipe=tensorwise", "--gpu", str(card))
    assert "it has no FP8 (fp8_tflops of its file is null)" in wrong


def test_every_shipped_gpu_says_which_fp8_it_has():
    able = {
        name: [recipe for recipe in WIDTH_MULTIPLE if obstacle(recipe, load_gpu(name).capability, None) is None]
        for name in GPUS.names()
    }
    hopper, blackwell = ["delayed", "tensorwise", "blockwise"], list(WIDTH_MULTIPLE)
    assert able == {
        "a100": [],
        **dict.fromkeys(("h100", "h200"), hopper),
        **dict.fromkeys(("b200", "b300", "gb200", "gb300"), blackwell),
    }
    assert all((load_gpu(name).fp8_tflops is not None) == bool(recipes) for name, recipes in able.items())
