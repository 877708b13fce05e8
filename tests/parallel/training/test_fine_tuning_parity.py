"""The same conversations in one micro-batch, in eight, packed, and over ranks: one loss and one gradient."""

import dataclasses

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.data.training_data import samples_of
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import DENSE_LAYOUTS, MOE_LAYOUTS
from tests.chats import chat_run, random_chats, write_chats
from tests.ranks import run_ranks

CASES = [
    *(("sft", normalization) for normalization in ("all_tokens", "answer_length", "masked_tokens", "conversations")),
    ("autoregressive_sft", "answer_length"),
    ("block_diffusion_sft", "answer_length"),
]
LENGTH = 32


def rank_gradients(runs):
    """Of each run, which all have one layout."""
    from llada_megatron.parallel import topology

    topology.initialize(runs[0].layout, runs[0].training.seed)
    return [
        parity.step_gradients(run, samples_of(make_objective(run.objective, run.training), run, "train"))
        for run in runs
    ]


def measure(runs):
    ranks = run_ranks(rank_gradients, runs[0].layout.world_size, runs)
    return [
        parity.Gradients(own[0][0], own[0][1], parity.join_parts(part for _, _, found in own for part in found))
        for own in zip(*ranks, strict=True)
    ]


def require_equal(one, other, name):
    error, where = parity.compare(one, other)
    assert error <= parity.GOAL, (name, where, error)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("parity") / "chats", random_chats(8, 2, longest_turn=4))


def run_of(chats, kind="sft", normalization="masked_tokens", confidence=1.0, **keys):
    if kind != "autoregressive_sft":
        keys["confidence_coefficient"] = confidence
    if kind == "block_diffusion_sft":
        keys["block_size"] = 4
    return chat_run(chats, LENGTH, kind=kind, normalization=normalization, padding="none", **keys)


def with_micro_batch(run, size):
    return dataclasses.replace(run, training=dataclasses.replace(run.training, micro_batch_size=size))


def packed(run):
    """The same conversations in as few windows as they need, all of them in one global batch."""
    objective = dataclasses.replace(run.objective, pack=True)
    run = dataclasses.replace(run, objective=objective)
    windows = samples_of(make_objective(objective, run.training), run, "train").sets[0].windows
    assert 1 < windows < 7
    return dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=windows))


@pytest.fixture(scope="module")
def in_one_process(chats):
    """By name: the gradients of one micro-batch of eight, of eight of one, and of packed windows; other runs."""
    runs = {}
    for case in CASES:
        run = run_of(chats, *case)
        runs |= {(case, "1x8"): with_micro_batch(run, 8), (case, "8x1"): run, (case, "packed"): packed(run)}
    runs |= {("confidence", value): with_micro_batch(run_of(chats, confidence=value), 8) for value in (0.0, 0.5)}
    runs |= {model: run_of(chats, model=model) for model in ("softmax", "sigmoid")}
    return dict(zip(runs, measure(list(runs.values())), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_accumulation_and_packing_change_nothing(in_one_process, case):
    for name in ("8x1", "packed"):
        require_equal(in_one_process[case, "1x8"], in_one_process[case, name], name)


def test_data_parallel_ranks_change_nothing(chats, in_one_process):
    found = measure([run_of(chats, *case, layout=LayoutConfig(data_parallel=2)) for case in CASES])
    for case, other in zip(CASES, found, strict=True):
        require_equal(in_one_process[case, "1x8"], other, case)


@pytest.mark.parametrize("layout", ["TP2.SP", "CP2"])
def test_layouts_change_nothing(chats, in_one_process, layout):
    cases = [CASES[2], CASES[-1]]
    found = measure([run_of(chats, *case, layout=DENSE_LAYOUTS[layout]) for case in cases])
    for case, other in zip(cases, found, strict=True):
        require_equal(in_one_process[case, "1x8"], other, (layout, case))


def test_pipeline_and_expert_ranks_change_nothing(chats, in_one_process):
    layout = MOE_LAYOUTS["PP2.EP2"]
    models = ("softmax", "sigmoid")
    found = measure([run_of(chats, model=model, layout=layout) for model in models])
    for model, other in zip(models, found, strict=True):
        require_equal(in_one_process[model], other, model)


def test_confidence_is_off_without_its_coefficient_and_counts_by_it(chats, in_one_process):
    zero, half, whole = in_one_process["confidence", 0.0], in_one_process["confidence", 0.5], None
    whole = in_one_process[CASES[2], "1x8"]
    assert whole.loss > half.loss > zero.loss
    assert whole.loss - zero.loss == pytest.approx(2 * (half.loss - zero.loss), rel=1e-3)
