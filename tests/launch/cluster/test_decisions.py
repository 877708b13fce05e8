"""What follows from how the ranks ended."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_megatron.launch.cluster.agent import job_attempt
from llada_megatron.launch.cluster.agent.decisions import (
    RankFault,
    RestartContext,
    after_end,
    after_faults,
    attempts_without_progress,
    cause,
    faults_of_exits,
)
from llada_megatron.launch.cluster.config import ClusterConfig
from llada_megatron.launch.cluster.fit import node_counts, resized
from llada_megatron.launch.cluster.node import expand_nodes
from llada_megatron.launch.ranks.rank_reports import Failure
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError, DataError

CONTEXT = RestartContext(
    max_restarts=2, nodes=2, fits=True, attempts_without_progress=1, stop_requested=False, stop_file=False
)
KILLED = RankFault("killed", "n1", 3, "was killed", 10.0)


def status(faults, **changes):
    verdict = after_faults(faults, replace(CONTEXT, **changes))
    return verdict and (verdict.status, verdict.nodes)


def test_a_killed_rank_is_the_cause_of_the_errors_of_the_others():
    reported = [Failure.of(0, RuntimeError("connection closed by peer")), Failure.of(1, DataError("empty"))]
    faults = faults_of_exits("n0", {0: 1, 1: 1, 2: -9, 3: -6, 4: 0, 5: 3}, reported, Path("logs"), 10.0)
    assert [fault.kind for fault in faults] == ["error", "user", "killed", "error", "error"]
    assert cause(faults).rank == 2
    assert cause([fault for fault in faults if fault.rank != 2]).kind == "user"
    assert "logs/rank-5.log" in faults[-1].what


def test_faults_restart_then_name_the_node_then_give_up():
    assert status([KILLED]) is None
    assert status([KILLED] * 2) is None
    assert status([KILLED] * 3) == ("exclude", ("n1",))
    assert status([KILLED] * 3, nodes=1) == ("requeue", ())
    assert status([KILLED, KILLED, replace(KILLED, node="n0")]) == ("requeue", ())
    assert status([KILLED] * 3, attempts_without_progress=2) == ("failed", ())
    assert status([KILLED], fits=False) == ("requeue", ())
    assert status([replace(KILLED, kind="user")]) == ("failed", ())
    assert status([KILLED], stop_requested=True) == ("requeue", ())
    assert status([KILLED], stop_requested=True, stop_file=True) == ("stopped", ())


@pytest.mark.parametrize(
    ("steps", "stop_file", "expected"), [(9, True, "done"), (4, True, "stopped"), (4, False, "requeue")]
)
def test_a_good_end(steps, stop_file, expected):
    assert after_end(steps, 9, stop_file).status == expected


def test_attempts_without_progress_are_counted_back_from_the_last():
    def start(attempt, checkpoint):
        return {"event": "start", "attempt": attempt, "checkpoint": checkpoint}

    events = [start(0, None), start(1, 5), start(2, 5), start(2, 8), start(3, 5), start(4, 5)]
    assert attempts_without_progress(events, 4, 5) == 4
    assert attempts_without_progress(events, 4, 9) == 0
    asked = {"event": "end", "attempt": 3, "asked": True}
    assert attempts_without_progress([*events, asked], 4, 5) == 3
    preempted = {"event": "asked", "attempt": 1}  # and killed before it could say how it ended
    assert attempts_without_progress([*events, asked, preempted], 4, 5) == 2


def test_a_run_goes_on_with_the_node_counts_that_its_batch_allows(tmp_path):
    text = "model: tiny-moe-softmax\ntraining: {steps: 3, sequence_length: 32, global_batch_size: 8}\n"
    text += "data: {sets: [{path: corpus}]}\nlayout: {data_parallel: 4, pipeline_parallel: 2}\noutput_dir: out\n"
    text += "optimizer: {learning_rate: {peak: 1e-3}}\n"
    (tmp_path / "run.yaml").write_text(text)
    run = load_run(tmp_path / "run.yaml")
    assert resized(run, 4).layout.data_parallel == 2
    assert node_counts(run, 2, 4) == [1, 2, 4]
    with pytest.raises(ConfigError, match="do not divide 3"):
        resized(run, 3)


def test_slurms_list_of_nodes():
    assert expand_nodes("n[01-03,7]x,m") == ["n01x", "n02x", "n03x", "n7x", "m"]
    assert expand_nodes("a[1-2]b[3-4]") == ["a1b3", "a1b4", "a2b3", "a2b4"]


def test_each_rank_has_its_share_of_the_cores_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    attempt, files = (
        SimpleNamespace(cluster=ClusterConfig(ranks_per_node=2)),
        SimpleNamespace(reports="r", heartbeats="h"),
    )
    monkeypatch.setattr(job_attempt, "threads_per_rank", lambda ranks: 16 // ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job_attempt.JobAttempt._environment(attempt, files)["OMP_NUM_THREADS"] == "8"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert job_attempt.JobAttempt._environment(attempt, files)["OMP_NUM_THREADS"] == "3"
