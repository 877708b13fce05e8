"""Decisions are on disk when they are taken, whatever a kill did to the file before."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.training.recovery import policy
from llada_megatron.parallel.training.recovery.decision_log import DecisionLog

FAULT = policy.StepFault(step=7, reason="spike", loss=9.5, grad_norm=math.inf, deviations=8.25)

DECISIONS = [
    dataclasses.replace(decision, number=number)
    for number, decision in enumerate(
        [policy.skipped(FAULT), policy.rolled_back(RecoveryConfig(learning_rate_factor=0.1), FAULT, 4)], start=1
    )
]


def test_a_line_that_a_kill_cut_short_is_left_out_and_spoils_no_other(tmp_path):
    journal = DecisionLog(tmp_path / "run")
    assert journal.read() == []
    journal.append(DECISIONS[0])
    with journal.path.open("a") as file:
        file.write('{"number": 2, "kind": "rollb')
    assert journal.read() == DECISIONS[:1]
    journal.append(DECISIONS[1])
    assert journal.read() == DECISIONS


def test_a_line_that_means_nothing_is_refused_with_its_place(tmp_path):
    journal = DecisionLog(tmp_path)
    journal.path.write_text('{"number": 1, "kind": "guess"}\n')
    with pytest.raises(CheckpointError, match=r"recovery\.jsonl.*expected one of retry, skip, rollback"):
        journal.read()


def test_a_new_run_does_not_take_over_old_decisions(tmp_path):
    journal = DecisionLog(tmp_path)
    journal.set_aside()
    journal.append(DECISIONS[0])
    journal.set_aside()
    assert journal.read() == []
    assert (tmp_path / "recovery.jsonl.old").exists()
