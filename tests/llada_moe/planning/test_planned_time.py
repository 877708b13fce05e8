"""The planner's step time answers to the layout, the loads and the GPU, each as it should."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.flops import block_causal_keys, flops_per_token
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import GPUS, load_gpu
from llada_megatron.llada_moe.planning.step_time import exchange_seconds_per_byte, step_time
from llada_megatron.llada_moe.planning.workload import of_run

PUBLISHED = ("llada-8b-pretrain", "llada-moe-7b-a1b-pretrain", "llada2-mini-pretrain", "llada2-flash-pretrain")
H100 = load_gpu("h100")
BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks.md"
OWN = "name: mine\nmemory_gib: 94\nbf16_tflops: 800\nmemory_gb_per_s: 3900\nlink_gb_per_s: 450\nnetwork_gb_per_s: 25\n"


def seconds(name, *overrides, imbalance=1.3, documents=8, gpu=H100):
    return Estimate(load_run(name, overrides), gpu, Assumptions(imbalance, documents)).time.total


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_fits_its_gpus_and_does_not_recompute_all(name):
    estimate = Estimate(load_run(name), H100, Assumptions())
    most = 0.84 if name == "llada-moe-7b-a1b-pretrain" else 0.8  # docs/benchmarks.md says why
    assert 0.6 <= estimate.card_bytes / 2**30 / H100.memory_gib <= most
    assert 0.15 <= estimate.utilisation <= 0.55
    assert estimate.run.training.recompute != "full"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_estimates_are_those_that_are_printed(name):
    row = re.search(rf"\| `{name}` \| \d+ \|[^|]*\| (\d+) GiB \| ([^|]*) \| ([^|]*) \|", BENCHMARKS.read_text())
    memory, speeds, shares = row.groups()
    estimates = [Estimate(load_run(name), H100, Assumptions(documents=documents)) for documents in (1, 8, 40)]
    assert estimates[0].card_bytes / 2**30 == pytest.approx(int(memory), abs=0.51)
    for estimate, speed, share in zip(estimates, speeds.split(", "), shares.split(", "), strict=True):
        tokens = estimate.run.training.global_batch_size * estimate.run.training.sequence_length
        per_gpu = tokens / estimate.time.total / estimate.run.layout.world_size
        assert per_gpu == pytest.approx(int(speed.replace(",", "")), rel=2e-3)
        assert 100 * estimate.utilisation == pytest.approx(int(share.removesuffix(" %")), abs=0.51)


def test_time_answers_to_the_layout():
    name = "llada2-flash-pretrain"
    before = seconds(name)
    assert seconds(name, "layout.pipeline_layers=null") > before  # the last stage then waits for its output layer
    assert seconds(name, "layout.expert_parallel=32") > 1.3 * before
    alone = ("layout.overlap_grad_reduce=false", "layout.overlap_param_gather=false")
    assert seconds(name, *alone) > 1.02 * before
    assert seconds(name, imbalance=2.0) > 1.2 * before
    assert seconds(name, documents=1) > before
    assert seconds(name, gpu=load_gpu("b200")) < before < seconds(name, gpu=load_gpu("a100"))


def test_more_micro_batches_make_the_bubble_smaller():
    def bubble(batch):
        estimate = Estimate(load_run("llada2-flash-pretrain", [batch]), H100, Assumptions())
        return estimate.time.parts["bubble"] / estimate.time.total

    assert bubble("training.global_batch_size=8192") < bubble("training.global_batch_size=2048")


def test_an_exchange_inside_a_node_takes_the_link():
    made = of_run(load_run("llada2-flash-pretrain"))
    inside = exchange_seconds_per_byte(made, H100)
    assert inside == pytest.approx(7 / 8 / H100.link_rate)
    wide = replace(made, layout=replace(made.layout, expert_parallel=16))
    assert exchange_seconds_per_byte(wide, H100) == pytest.approx(7 / 16 / H100.link_rate + 0.5 / H100.network_rate)
    once = exchange_seconds_per_byte(replace(wide, fused_dispatch=True), H100)
    assert once < exchange_seconds_per_byte(wide, H100)  # a token goes once to each node


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no GPU 'rtx'; known: a100, b200, b300, gb200, gb300, h100, h200"):
        load_gpu("rtx")


@pytest.mark.parametrize("name", GPUS.names())
def test_the_gpus_that_come_with_the_package_can_be_read(name):
    assert load_gpu(name).memory_rate > 1e12


def test_a_gpu_of_a_users_own_is_a_few_numbers(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    assert load_gpu(str(file)).memory_gib == 94
    file.write_text(OWN.replace("memory_gib: 94\n", ""))
    with pytest.raises(ConfigError, match=r"mine.yaml.*memory_gib: missing"):
        load_gpu(str(file))
    file.write_text(OWN.replace("94", "-1"))
    with pytest.raises(ConfigError, match=r"mine.yaml:2.*memory_gib: -1.0 must be a number greater than 0"):
        load_gpu(str(file))
    file.write_text(OWN + "gemm_share: 62\n")
    with pytest.raises(ConfigError, match="gemm_share: 62.0 is a share, at most 1"):
        load_gpu(str(file))


def test_a_cache_holds_the_keys_and_values_of_each_layer():
    estimate = Estimate(load_run("llada2-flash-pretrain"), H100, Assumptions())
    model, length = estimate.run.model, estimate.run.training.sequence_length
    assert estimate.cache_bytes == 4 * 9 * model.num_key_value_heads * model.head_dim * length  # 9 layers at most


def test_block_diffusion_holds_the_text_twice_where_it_has_blocks():
    run = load_run("llada2-mini-from-ling")
    estimate = Estimate(run, H100, Assumptions())
    once = of_run(run, copies=1)
    made = estimate.workload
    assert made.tokens == 2 * once.tokens and made.tokens * made.supervised == once.tokens  # the output layer sees one
    assert made.keys == block_causal_keys(4096, 32) and once.keys == 4096  # one block: full attention
    assert estimate.largest_share == pytest.approx(1 - 20000 / 25500, abs=0.01)  # the stable stage is one block
    shorter = step_time(of_run(run, 1.3, copies=1), H100).total
    mean = estimate.largest_share * estimate.time.total + (1 - estimate.largest_share) * shorter
    assert estimate.run_seconds == pytest.approx(25500 * mean) and shorter < estimate.time.total
    each, layers = flops_per_token(run.model, 4096, keys_per_query=made.keys), estimate.flops_per_step
    assert layers / estimate.tokens_per_step == pytest.approx(2 * each.total - each.output_layer)


def test_an_objective_says_itself_what_is_attended_to_and_learnt():
    run = load_run("llada-8b-pretrain")
    causal = of_run(replace(run, objective=FineTuningConfig(kind="autoregressive_sft")))
    assert (causal.keys, causal.supervised_mean) == ((4096 + 1) / 2, 1.0)
    masked = of_run(replace(run, objective=FineTuningConfig(kind="sft", mask_ratio_min=0.3, mask_ratio_max=0.8)))
    assert masked.keys == 4096 and masked.supervised_mean == pytest.approx(0.55)
    blocks = replace(run, objective=replace(run.objective, block_size=1024))
    assert of_run(blocks, documents=8).keys == 512  # a document that is shorter than a block sees itself
