"""`llada stop` and `llada logs`, with a SLURM whose programs do what files say."""

import os

import pytest

from llada_megatron import cli
from llada_megatron.launch.cluster import registry
from llada_megatron.launch.cluster.job import JobDirectory, Verdict


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job 7; squeue shows `state`, scancel notes its arguments and sets `state` to what `after` says."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "squeue": f'echo "7|$(cat {tmp_path}/state)|None|n1|1:00"',
        "scancel": f"echo $@ >> {tmp_path}/calls; cp {tmp_path}/after {tmp_path}/state",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    job = JobDirectory(tmp_path / "run" / "jobs" / "a")
    job.path.mkdir(parents=True)
    registry.write(job, registry.JobRecord(7, "run", 1.0, str(tmp_path / "run"), 2, 4, 100, "c.yaml"))
    (tmp_path / "after").write_text("COMPLETED\n")
    return job


def stop(job, state, *options):
    folder = job.path.parents[2]
    (folder / "state").write_text(state + "\n")
    code = cli.main(["stop", "7", *options])
    calls = folder / "calls"
    return code, calls.read_text().splitlines() if calls.exists() else []


def test_a_running_job_is_asked_to_save_and_waited_for(job, capsys):
    job.write_verdict(0, Verdict("requeue", "node lost"))
    (job.path / "attempt").write_text("1\n")
    job.write_verdict(1, Verdict("stopped", "stopped as asked, after step 9"))
    assert stop(job, "RUNNING") == (0, ["--batch --signal=USR1 7"])
    assert job.stop.exists()
    assert "stopped as asked, after step 9" in capsys.readouterr().out


def test_a_waiting_job_is_taken_out_of_the_queue(job, capsys):
    (job.path.parents[2] / "after").write_text("CANCELLED\n")
    assert stop(job, "PENDING") == (0, ["--state=PENDING 7"])
    assert "job 7: stopped" in capsys.readouterr().out


def test_a_job_that_is_over_is_left_alone(job, capsys):
    job.write_verdict(0, Verdict("failed", "rank 1: bad data"))
    assert stop(job, "FAILED") == (1, [])
    assert not job.stop.exists()
    assert "already over" in capsys.readouterr().err


def test_a_job_that_is_queued_again_meanwhile_is_taken_out(job):
    """The signal met a job that was just going back into the queue."""
    scancel = job.path.parents[2] / "bin" / "scancel"
    text = scancel.read_text()
    scancel.write_text(text + f"[ $1 = --batch ] && echo PENDING > {job.path.parents[2]}/state\ntrue\n")
    assert stop(job, "RUNNING") == (0, ["--batch --signal=USR1 7", "--state=PENDING 7"])


def test_a_job_that_takes_no_signal_is_still_stopped(job, capsys):
    """It is going back into the queue (COMPLETING) and would come again; or it is suspended."""
    scancel = job.path.parents[2] / "bin" / "scancel"
    states = job.path.parents[2] / "state"
    scancel.write_text(
        f"#!/bin/sh\n[ $1 = --batch ] && {{ echo PENDING > {states}; exit 1; }}\necho CANCELLED > {states}\n"
    )
    assert stop(job, "COMPLETING")[0] == 0
    assert "takes no signal now" in capsys.readouterr().err
    assert job.stop.exists()


def test_without_waiting_the_command_returns_at_once(job):
    (job.path.parents[2] / "after").write_text("RUNNING\n")
    assert stop(job, "RUNNING", "--no-wait") == (0, ["--batch --signal=USR1 7"])


def test_logs_show_the_end_of_the_output_and_follow_it_to_the_end_of_the_job(job, capsys):
    folder = job.path.parents[2]
    (folder / "state").write_text("RUNNING\n")
    assert cli.main(["logs", "7"]) == 2
    assert "does not exist yet" in capsys.readouterr().err
    job.output.write_text("".join(f"line {number}\n" for number in range(20000)))
    assert cli.main(["logs", "7", "--lines", "3"]) == 0
    assert capsys.readouterr().out == "line 19997\nline 19998\nline 19999\n"
    (folder / "state").write_text("COMPLETED\n")
    assert cli.main(["logs", str(folder / "run"), "--follow", "--lines", "1"]) == 0
    assert capsys.readouterr().out == "line 19999\n"


def test_following_a_job_that_is_done_ends_without_slurm(job, capsys, monkeypatch):
    job.output.write_bytes("▇\n".encode() * 50000)  # a block ends inside a character
    job.write_verdict(0, Verdict("done", "trained to step 100"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["logs", "7", "--follow", "--lines", "50000"]) == 0
    assert capsys.readouterr().out == "▇\n" * 50000


def test_logs_of_a_rank(job, capsys):
    logs = job.path.parents[1] / "logs"
    logs.mkdir()
    (logs / "rank-3.log").write_text("stack\n")
    assert cli.main(["logs", "7", "--rank", "3"]) == 0
    assert capsys.readouterr().out == "stack\n"
    assert cli.main(["logs", "7", "--rank", "4"]) == 2
    assert "the job has the ranks 0 to 3" in capsys.readouterr().err


def test_control_characters_are_shown_and_not_sent_to_the_terminal(job, capsys):
    job.output.write_bytes("a\x1b]0;title\x07\r\x9b2J\tb é\n".encode() + b"\xff\xe2\x96\n")
    assert cli.main(["logs", "7"]) == 0
    assert capsys.readouterr().out == "a␛]0;title␇␍\ufffd2J\tb é\n\\xff\\xe2\\x96\n"
    assert cli.main(["logs", "7\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err
