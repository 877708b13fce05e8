"""The planner against published runs: who is compared, on whose constants, and what the figures are."""

import json

import pytest

from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.tools.bench import plan
from llada_megatron.tools.bench.planning.fitting import LIMITS, fit, split
from llada_megatron.tools.bench.planning.published_runs import NotModelled, published_run, read_cases

CASES = {case["id"]: case for case in read_cases()}


@pytest.fixture(scope="module")
def runs():
    return plan.modelled(None)


def test_the_goals_hold(runs):
    found = plan.claims(plan.memory_rows(runs), plan.time_rows(runs, refit=False))
    assert {claim.holds for claim in found} == {True, None}
    assert sum(claim.holds is True for claim in found) == 3
    assert "26 peaks" in found[0].claim and found[0].value == 1.0


def test_at_most_a_third_is_fitted_on_and_no_configuration_is_on_both_sides(runs):
    for name, timed in plan.by_gpu(runs).items():
        parts = split(timed)
        assert len(parts.fitted) <= len(timed) / 3, name
        assert len(parts.fitted) + len(parts.tried) == len(timed)
        assert not {run.group for run in parts.fitted} & {run.group for run in parts.tried}


def test_the_split_does_not_look_at_what_was_measured(runs):
    from dataclasses import replace

    timed = plan.by_gpu(runs)["h100"]
    other = [replace(run, step_s=1.0) for run in reversed(timed)]
    assert {run.name for run in split(timed).fitted} == {run.name for run in split(other).fitted}


def test_the_file_of_a_gpu_holds_what_a_fit_gives(runs):
    shipped = load_gpu("h100")
    fitted = fit(shipped, split(plan.by_gpu(runs)["h100"]).fitted)
    for key in LIMITS:
        assert getattr(fitted, key) == pytest.approx(getattr(shipped, key), rel=1e-3), key


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchtitan-8b-8-fsdp", "FSDP"),
        ("mlm-moe_perf-mixtral_a2a_tp1ep8_bf16", "one MoE layer"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(name, reason):
    with pytest.raises(NotModelled, match=reason):
        published_run(CASES[name])


@pytest.mark.parametrize(
    ("name", "memory", "time"),
    [
        ("mlm-gpt3_mcore_te_tp2_pp2_ep4_etp1_memory_speed-h100", "unfused attention", "unfused"),
        ("mlm-gpt3_moe_mcore_te_ep8_resume_torch_dist_dist_optimizer-h100", "all-gather dispatcher", "functional test"),
        ("bridge-moonlight-h100-8-rc-none", "no peak", "dispatcher"),
        ("simumax-llama3_70b_l12_tp8_pp1_dp1_mbc4_cef", "", ""),
    ],
)
def test_what_cannot_be_predicted_is_labelled(name, memory, time):
    run = published_run(CASES[name])
    assert (memory in run.memory_label) and bool(memory) == bool(run.memory_label)
    assert (time in run.time_label) and bool(time) == bool(run.time_label)


def test_cases_that_share_a_measurement_count_once(runs):
    names = [row.run.name for row in plan.memory_rows(runs)]
    assert sum("llama3_70b_l12_tp8_pp1" in name for name in names) == 1


def test_other_cases_can_be_tried(tmp_path, capsys):
    case = CASES["simumax-llama3_70b_l12_tp8_pp1_dp1_mbc4_cef"]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": [case]}))
    rows = plan.memory_rows(plan.modelled(file))
    assert len(rows) == 1 and abs(rows[0].error) < 0.03
    with pytest.raises(DataError, match="none.json: No such file"):
        plan.modelled(tmp_path / "none.json")
    file.write_text("[]")
    with pytest.raises(DataError, match="cases.json: no file of published runs"):
        plan.modelled(file)
