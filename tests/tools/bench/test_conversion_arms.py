"""The runs that `llada bench ar-to-diffusion` compares, and what it concludes and draws from their bounds."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llada_megatron.llada_moe.config import load_run, validate_run
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.evaluation.assessment import Baselines
from llada_megatron.tools.bench import ar_to_diffusion, conversion_arms
from llada_megatron.tools.bench.conversion_arms import (
    ARMS,
    AT_ONCE,
    BLOCKS,
    EXACT,
    SCHEDULE,
    SCRATCH,
    SCRATCH_ALL,
    WHOLE,
    CheckpointCost,
    TrainedArm,
    arms_of,
    trained,
)
from llada_megatron.tools.bench.conversion_picture import draw


@pytest.fixture(scope="module")
def base():
    return load_run("ar-to-diffusion")


def test_the_runs_differ_in_what_is_compared_and_end_alike(base):
    arms = arms_of(base)
    assert tuple(arms) == ARMS and arms[SCHEDULE] is base
    for run in arms.values():
        validate_run(run)
        assert run.objective.block_schedule.decay == base.objective.block_schedule.decay
        assert run.optimizer == base.optimizer
    steps = {name: run.training.steps for name, run in arms.items()}
    assert steps[SCHEDULE] == steps[AT_ONCE] == steps[SCRATCH_ALL] == 630 and steps[SCRATCH] == 330
    begins = {name: run.objective.block_schedule.autoregressive_tokens > 0 for name, run in arms.items()}
    assert begins == {SCHEDULE: True, AT_ONCE: True, SCRATCH: False, SCRATCH_ALL: False}
    assert not any(arms[name].objective.block_schedule.warmup for name in (AT_ONCE, SCRATCH, SCRATCH_ALL))
    assert {name: run.objective.mask_embedding_noise > 0 for name, run in arms.items()} == begins


@pytest.mark.parametrize("key", ["autoregressive_tokens", "warmup"])
def test_a_run_without_what_is_compared_is_refused(base, key):
    schedule = dataclasses.replace(base.objective.block_schedule, **{key: 0 if key != "warmup" else []})
    run = dataclasses.replace(base, objective=dataclasses.replace(base.objective, block_schedule=schedule))
    with pytest.raises(ConfigError, match="whose objective.block_schedule has autoregressive_tokens and a warmup"):
        arms_of(run)


def of_seed(noise, last=2.5, begins=True):
    first = [CheckpointCost(300, {EXACT: 2.0 + noise})] if begins else []
    bounds = [
        CheckpointCost(step, {WHOLE: last + noise + gap, BLOCKS: last + noise})
        for step, gap in ((330, 0.5), (630, 0.1))
    ]
    return TrainedArm([*first, *bounds], cpu_seconds=10.0)


@pytest.fixture
def found():
    """The schedule is better than at once by 0.02 ± 0.01, than from scratch by 0.3, and worse than all tokens."""
    noises, gains = (0.1, -0.1, 0.0), (0.01, 0.02, 0.03)
    return {
        SCHEDULE: [of_seed(noise) for noise in noises],
        AT_ONCE: [of_seed(noise + gain) for noise, gain in zip(noises, gains, strict=True)],
        SCRATCH: [of_seed(0.01, 2.8, begins=False) for _ in noises],
        SCRATCH_ALL: [of_seed(noise, 2.45, begins=False) for noise in noises],
    }


OTHERS = Baselines(unigram=3.4, bigram=2.4, zlib=2.6)


def test_bounds_are_compared_seed_by_seed(found):
    claims = ar_to_diffusion.claims(found, OTHERS)
    at_once, scratch, everything = claims[:3]
    assert at_once.value == pytest.approx(0.02) and at_once.holds and AT_ONCE in at_once.claim
    assert at_once.goal == f">= {2 * 0.01 / 3**0.5:g}"
    assert scratch.value == pytest.approx(0.31) and scratch.holds
    assert everything.value == pytest.approx(-0.05) and everything.holds is False
    values = {claim.claim: claim.value for claim in claims}
    assert values["cost under the autoregressive model before (± 0.100)"] == pytest.approx(2.0)
    assert values["zlib"] == 2.6


def test_one_seed_shows_nothing(found):
    claims = ar_to_diffusion.claims({name: seeds[:1] for name, seeds in found.items()}, OTHERS)
    assert all(claim.holds is None for claim in claims)


def test_table_and_picture_show_each_run(found, base, tmp_path):
    lines = ar_to_diffusion.table(found, arms_of(base)).splitlines()
    assert len(lines) == 1 + len(ARMS)
    assert lines[1].startswith(f"{SCHEDULE}  ")
    assert lines[1].split()[-9:] == ["630", "645,120", "10", "2.500", "±", "0.100", "2.600", "±", "0.100"]
    draw(tmp_path / "bounds.svg", found, base, OTHERS)
    drawn = (tmp_path / "bounds.svg").read_text("utf-8")
    assert drawn.startswith("<?xml") and len(drawn) > 10_000


def test_what_was_measured_is_not_measured_again(base, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(conversion_arms, "_train", lambda run, spent: ran.append(run) or spent(1.5))
    monkeypatch.setattr(conversion_arms, "measured", lambda path, windows: [CheckpointCost(30, {EXACT: 3.0})])
    first = trained(base, 7, tmp_path, windows=4)
    assert ran[0].training.seed == 7 and ran[0].output_dir == str(tmp_path)
    assert trained(base, 7, tmp_path, windows=4) == first and len(ran) == 1
    assert trained(base, 7, tmp_path, windows=5) == dataclasses.replace(first, cpu_seconds=3.0) and len(ran) == 2
    assert json.loads((tmp_path / "bounds.json").read_text("utf-8"))["windows"] == 5


def test_a_folder_of_a_run_with_other_settings_is_refused(base, tmp_path, monkeypatch):
    def stopped(run, spent):
        spent(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion_arms, "_train", stopped)
    monkeypatch.setattr(conversion_arms, "measured", lambda path, windows: [CheckpointCost(30, {EXACT: 3.0})])
    with pytest.raises(KeyboardInterrupt):
        trained(base, 7, tmp_path / "arm", windows=4)
    (tmp_path / "arm").rename(tmp_path / "moved")
    smaller = dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=1))
    for run, seed in ((smaller, 7), (base, 8)):
        with pytest.raises(ConfigError, match="a run with other settings was trained there"):
            trained(run, seed, tmp_path / "moved", windows=4)
    monkeypatch.setattr(conversion_arms, "_train", lambda run, spent: spent(1.5))
    assert trained(base, 7, tmp_path / "moved", windows=4).cpu_seconds == 2.5
