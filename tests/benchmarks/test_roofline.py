"""The estimates that the run files are set by: their memory, their exchanges, and how both answer to a change."""

import argparse

import pytest

from benchmarks import roofline
from llada_megatron.launch.layout_choice import state_bytes
from llada_megatron.llada_moe.config import load_run


def shapes(name, *overrides, imbalance=1.3):
    return roofline.Shapes(load_run(name, overrides), imbalance)


def total(parts):
    return sum(parts.values())


@pytest.mark.parametrize("name", roofline.RUNS)
def test_a_published_run_fills_most_of_a_card_and_keeps_its_experts_in_a_node(name):
    made = shapes(name)
    assert 0.6 <= total(roofline.memory(made)) / roofline.CARD <= 0.8
    assert made.run.layout.tensor_parallel * made.run.layout.expert_parallel <= roofline.NODE
    assert made.run.training.recompute != "full"


@pytest.mark.parametrize("name", roofline.RUNS)
def test_the_state_is_what_a_new_run_file_counts(name):
    made = shapes(name)
    held = roofline.memory(made)
    state = held["weights"] + held["gradients"] + held["optimizer"]
    assert state == pytest.approx(state_bytes(made.run.model, made.run.layout, "bf16"), rel=0.1)


def test_memory_answers_to_what_is_run_again_and_kept():
    name = "llada-moe-7b-a1b-pretrain"
    kept = {
        choice: roofline.memory(shapes(name, *choice.split()))["activations"]
        for choice in (
            "training.recompute=none training.recompute_modules=[]",
            "training.recompute=selective training.recompute_modules=[moe_act]",
            "training.recompute=selective training.recompute_modules=[moe]",
            "training.recompute=full training.recompute_modules=[]",
        )
    }
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    run = load_run(name)
    assert min(kept.values()) == 16 * 4 * 4096 * 2 * run.model.hidden_size  # the inputs of 16 layers, in bf16
    halved = roofline.memory(shapes(name, "training.micro_batch_size=2"))["activations"]
    assert halved == roofline.memory(shapes(name))["activations"] / 2


def test_time_answers_to_the_layout():
    name = "llada2-flash-pretrain"
    before = total(roofline.step_time(shapes(name), 8))
    assert total(roofline.step_time(shapes(name, "layout.pipeline_layers=null"), 8)) > before
    assert total(roofline.step_time(shapes(name, "layout.expert_parallel=32"), 8)) > 1.3 * before
    alone = ("layout.overlap_grad_reduce=false", "layout.overlap_param_gather=false")
    assert total(roofline.step_time(shapes(name, *alone), 8)) > 1.02 * before
    assert total(roofline.step_time(shapes(name, imbalance=2.0), 8)) > 1.2 * before
    assert roofline.grouped_share(256) == 0.30 and 0.30 < roofline.grouped_share(300) < 0.40


def test_the_report_says_memory_speed_and_utilisation(capsys):
    parser = argparse.ArgumentParser()
    roofline.add_arguments(parser)
    assert roofline.run(parser.parse_args(["llada2-mini-pretrain", "training.micro_batch_size=1"])) == 0
    text = capsys.readouterr().out
    assert text.startswith("llada2-mini-pretrain: 64 GPUs, 16 micro-batches of 4,096 tokens\n  memory ")
    assert all(f"{documents:>2} documents:" in text for documents in roofline.DOCUMENTS)
    assert "tokens/s/GPU" in text and "of 989 TFLOP/s" in text
