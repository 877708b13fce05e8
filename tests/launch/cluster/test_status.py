"""`llada jobs` and its records: the status of a job at each stage, from SLURM's state and the job's own records."""

import json
import os

import pytest

from llada_megatron import cli
from llada_megatron.launch.cluster import registry, slurm
from llada_megatron.launch.cluster.job import JobDirectory, Verdict
from llada_megatron.launch.cluster.slurm import QueuedJob
from llada_megatron.launch.cluster.status import status, statuses
from llada_megatron.launch.jobs import duration, table
from llada_megatron.llada_moe.errors import ConfigError


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def submitted(output_dir, job_id=7, name="20260101-000000"):
    job = JobDirectory(output_dir / "jobs" / name)
    job.path.mkdir(parents=True)
    record = registry.JobRecord(job_id, output_dir.name, float(job_id), str(output_dir), 2, 4, 100, "c.yaml")
    registry.write(job, record)
    return registry.SubmittedJob(job, record)


def begin(job, attempt):
    """What the script does first."""
    (job.directory.path / "attempt").write_text(f"{attempt}\n")


def queued(state, reason="None", nodes="n[1-2]"):
    return QueuedJob(7, state, reason, nodes, "1:00:00")


@pytest.fixture
def job(tmp_path, state):
    return submitted(tmp_path / "demo")


def test_a_running_job_shows_the_newest_step_and_the_time_left(job, tmp_path):
    lines = [
        {"step": 20, "loss": 3.5, "tokens_per_second": 900.0, "seconds_per_step": 30.0},
        {"step": 21, "loss": None},
    ]
    (tmp_path / "demo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job.directory.add_event(0, "n1", "start", checkpoint=0)
    begin(job, 1)
    assert status(job, queued("RUNNING"), slurm=True).note == "checking the nodes"
    job.directory.add_event(1, "n1", "start", checkpoint=20, nodes=["n1", "n2"])
    job.directory.add_event(1, "n1", "restart", reason="rank 3 on n2 was killed")
    job.directory.add_event(1, "n1", "start", checkpoint=20, nodes=["n1"])
    found = status(job, queued("RUNNING"), slurm=True)
    assert (found.state, found.step, found.steps, found.loss) == ("RUNNING", 21, 100, None)
    assert (found.tokens_per_second, found.seconds_left) == (900.0, 79 * 30.0)
    assert (found.requeues, found.restarts, found.nodes) == (1, 1, "n[1-2]")
    assert found.note == "on 1 of 2 nodes; ranks started again: rank 3 on n2 was killed"
    text = "\n".join(table([found]))
    assert all(part in text for part in ("7", "demo", "RUNNING", "21/100", "900", "39m 30s", "1+1"))


def test_each_stage_has_its_words(job):
    assert status(job, queued("PENDING", "Resources", ""), True).note == "Resources"
    assert status(job, queued("RUNNING"), True).note == "checking the nodes"
    job.directory.add_event(0, "n1", "start", checkpoint=0)
    assert status(job, queued("RUNNING"), True).note == ""
    job.directory.write_verdict(0, Verdict("exclude", "n2 has 1 GPU instead of 2", ("n2",)))
    again = status(job, queued("PENDING", "BeginTime", ""), True)
    assert (again.state, again.note, again.requeues) == (
        "PENDING",
        "BeginTime; queued again: n2 has 1 GPU instead of 2",
        1,
    )
    job.directory.stop.touch()
    assert status(job, queued("RUNNING"), True).note == "saving and ending on request"


@pytest.mark.parametrize("known", [None, queued("COMPLETED"), queued("COMPLETING")])
@pytest.mark.parametrize("slurm", [True, False])
def test_a_final_verdict_needs_no_slurm(job, known, slurm):
    begin(job, 1)
    job.directory.write_verdict(1, Verdict("failed", "rank 2: no space"))
    found = status(job, known, slurm)
    assert (found.state, found.note, found.live) == ("failed", "rank 2: no space", False)


def test_an_end_without_a_verdict_is_told_in_the_words_of_slurm(job):
    cancelled = status(job, queued("CANCELLED"), True)
    assert (cancelled.state, cancelled.live) == ("CANCELLED", False)
    assert status(job, None, True).state == "ended"
    assert status(job, None, False).state == "unknown"


def test_a_stopped_job_says_whether_it_could_save(job):
    job.directory.stop.touch()
    assert "before its ranks ran" in status(job, queued("CANCELLED"), True).note
    job.directory.add_event(0, "n1", "start", checkpoint=0)
    assert status(job, queued("CANCELLED"), True).note == "killed before it had saved"


def test_metrics_belong_to_the_newest_job_of_a_run(tmp_path, state):
    old = submitted(tmp_path / "demo", 7)
    new = submitted(tmp_path / "demo", 8, "20260102-000000")
    (tmp_path / "demo" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    assert [each.step for each in statuses([old, new], {})] == [0, 5]


def test_a_job_is_found_by_its_id_its_run_and_its_directory(tmp_path, state):
    first, second = submitted(tmp_path / "a"), submitted(tmp_path / "b", 8)
    assert registry.find("7") == [first] and registry.find("8") == [second]
    assert registry.find(str(tmp_path / "a")) == registry.find(str(first.directory.path)) == [first]
    assert registry.jobs_of_user() == [first, second]
    another_cluster = submitted(tmp_path / "c", 7)
    assert registry.find("7") == [another_cluster]
    for word in ("9", str(tmp_path)):
        with pytest.raises(ConfigError, match=word):
            registry.find(word)


def test_a_job_that_runs_for_weeks_without_a_word_is_listed(job, monkeypatch, capsys):
    """Old directories of jobs that SLURM has forgotten are not; what a full disk cut short is passed over."""
    (job.directory.path / "events").mkdir()
    (job.directory.path / "events" / "n1.jsonl").write_bytes(b'{"time": 1.0, "att\n7\n\xff\n')
    for path in (job.directory.path, job.directory.path / "events"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(slurm, "queue", lambda ids: {7: queued("RUNNING")})
    assert cli.main(["jobs"]) == 0
    assert "RUNNING" in capsys.readouterr().out
    monkeypatch.setattr(slurm, "queue", lambda ids: {})
    assert cli.main(["jobs"]) == 0
    assert capsys.readouterr().out == ""


def test_times_for_people():
    assert [duration(s) for s in (5, 130, 15600, 270000)] == ["5s", "2m 10s", "4h 20m", "3d 3h"]
