"""The cost of held-out text is the same under every layout, and what is said of it is what it is."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.config.intervals import ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import DENSE_LAYOUTS, MODELS, parity_run
from tests.ranks import run_ranks

SEQUENCES = 6  # no multiple of the micro-batches of two data-parallel ranks


def cost(run):
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training.validation import validate

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    found = validate(run, make_objective(run.objective), models, parity.SyntheticData(run), 0)
    return found.nats, found.tokens, found.sequences


def run_under(layout, micro_batch_size=1):
    run = parity_run(MODELS["dense"], layout, micro_batch_size=micro_batch_size)
    return dataclasses.replace(run, validation=ValidationConfig(interval=1, sequences=SEQUENCES))


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(cost, 1, run_under(LayoutConfig()))[0]


@pytest.mark.parametrize("name", ["TP2", "TP2.SP", "CP2", "TP2.SP.PP2"])
def test_a_layout_finds_the_cost_that_one_process_finds(one_process, name):
    layout = DENSE_LAYOUTS[name]
    for nats, tokens, sequences in run_ranks(cost, layout.world_size, run_under(layout)):
        assert nats == pytest.approx(one_process[0], rel=1e-5)
        assert (tokens, sequences) == one_process[1:]


def test_sequences_that_fill_the_last_batch_do_not_count(one_process):
    found = run_ranks(cost, 2, run_under(DENSE_LAYOUTS["DP2"], micro_batch_size=4))
    assert found == [(pytest.approx(one_process[0], rel=1e-5), *one_process[1:])] * 2


@pytest.mark.parametrize(
    ("keys", "loss_is_bound", "only_masks"),
    [
        ({}, True, True),
        ({"normalization": "masked_tokens"}, False, True),
        ({"mask_ratio_min": 0.3}, False, True),
        ({"mask_ratio_max": 0.8}, False, True),
        ({"replace_ratio": 0.1}, False, False),
    ],
    ids=str,
)
def test_figures_of_diffusion_say_what_they_are(keys, loss_is_bound, only_masks):
    objective = make_objective(ObjectiveConfig(**keys))
    assert objective.loss_is_bound is loss_is_bound
    assert ("bits_per_byte" in objective.metrics(1.0, 4.0)) is loss_is_bound
    assert objective.only_masks_supervised is only_masks
    assert objective.validation_is_bound  # it draws from the whole range, replaces nothing, and counts all tokens


def test_figures_of_autoregression_say_what_they_are():
    objective = make_objective(ObjectiveConfig(kind="autoregressive"))
    assert objective.loss_is_bound and objective.validation_is_bound and not objective.only_masks_supervised
