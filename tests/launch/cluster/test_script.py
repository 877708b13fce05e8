"""The script of a job: what it asks SLURM for, and what it does with a verdict (SLURM's programs are stand-ins)."""

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from llada_megatron.launch.cluster.config import ClusterConfig, ContainerConfig
from llada_megatron.launch.cluster.job import JobDirectory
from llada_megatron.launch.cluster.script import render
from llada_megatron.launch.cluster.script_checks import check_environment
from llada_megatron.llada_moe.errors import ConfigError

CLUSTER = ClusterConfig(ranks_per_node=2, time="0-02:00:00", max_requeues=2)

PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": """
if [ "$1" = show ]; then case $3 in "$SLURM_JOB_NODELIST") echo $HEAD ;; *) echo "$3" | tr , "\\n" ;; esac; exit; fi
if [ -e "$LLADA_JOB/controller-away" ]; then rm "$LLADA_JOB/controller-away"; exit 1; fi
echo "$@" >> "$LLADA_JOB/calls" """,
    "squeue": 'case "$*" in *%T*) echo $STATE ;; *%x*) echo "$EXCLUDED" ;; esac',
    "sinfo": "for name in $PARTITION; do echo idle $name; done; echo drng n90; echo 'alloc* n91'",
    "sleep": "exec /bin/sleep 0.05",
}
NODE = """
echo "$3 $LLADA_ATTEMPT $LLADA_RENDEZVOUS $OURS" >> "$LLADA_JOB/started"
case $3 in *preflight) eval "$PREFLIGHT" ;; *agent) eval "$AGENT" ;; esac"""


class Script:
    """A rendered script beside stand-ins for the programs that it calls."""

    def __init__(self, folder):
        self.folder, self.job = folder, folder / "the run" / "jobs" / "one"
        self.job.mkdir(parents=True)
        (folder / "bin").mkdir()
        for name, text in (PROGRAMS | {"node-python": NODE}).items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_PARTITION": "main",
            "PARTITION": "n1 n2 n3 n4 n5 n6 n7 n8",
            "HEAD": "localhost",
            "STATE": "RUNNING",
            "EXCLUDED": "",
            "PREFLIGHT": "",
            "AGENT": "",
        }

    def start(self, cluster=CLUSTER, attempt=0, **environment):
        cluster = dataclasses.replace(cluster, python=str(self.folder / "bin" / "node-python"))
        path = self.folder / "job.sbatch"
        path.write_text(render(cluster, 2, self.job, "demo", self.folder, [1, 2]))
        restarts = {"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}
        return subprocess.Popen(
            ["bash", str(path)],
            env=self.environment | restarts | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **keywords):
        """Exit code, and the calls of scontrol that change something."""
        process = self.start(*arguments, **keywords)
        self.output = process.communicate(timeout=120)[0]
        return process.returncode, self.lines("calls")

    def lines(self, name):
        path = self.job / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def says(verdict, attempt=0):
    return f"printf '{verdict}\\nfor a reason\\n' > \"$LLADA_JOB/verdict-{attempt}\""


REQUEUE = ["requeue 17"]


def test_a_script_is_whole_bash_with_every_option_quoted(tmp_path):
    cluster = dataclasses.replace(
        CLUSTER,
        gpus_per_node=2,
        partition="main",
        exclude=["n3", "n[5-6]"],
        cpus_per_node=16,
        environment=["NOTE=it's $HOME/${HOME}x \\$HOME $(id) $1"],
        container=ContainerConfig(image="/i mages/x.sqsh", mounts=["/data:/data", "/runs:/runs"]),
        sbatch_options=["--comment=x"],
    )
    text = render(cluster, 2, tmp_path / "100% mine", "demo", tmp_path, [2])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    asked = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert f"--output={tmp_path}/100%% mine/job.out" in asked  # % is special to sbatch
    for option in ("--nodes=2", "--gpus-per-node=2", "--exclude=n3,n[5-6]", "--signal=B:USR1@300", "--requeue"):
        assert option in asked
    assert {"--exclusive", "--no-kill", "--comment=x", "--partition=main"} <= set(asked)
    step = shlex.split(text.partition("    srun ")[2].partition("&")[0])
    assert {"--container-image=/i mages/x.sqsh", "--container-mounts=/data:/data,/runs:/runs"} <= set(step)
    assert "--cpus-per-task=16" in step
    assert "-P -m llada_megatron.launch.cluster.agent" in text and "on_every_node python -P" in text
    exported = subprocess.run(
        ["bash", "-c", next(line for line in text.splitlines() if line.startswith("export NOTE")) + "; echo $NOTE"],
        capture_output=True,
        text=True,
        env={"HOME": "/h"},
    )
    assert exported.stdout == "it's /h//hx $HOME $(id) $1\n"


def test_gpus_and_hosts_are_asked_for_in_the_words_of_the_cluster_file(tmp_path):
    cluster = dataclasses.replace(CLUSTER, gpus_per_node="gpu:a100:2", exclude="n[1-4,7], n9", time="INFINITE")
    asked = [line for line in render(cluster, 2, tmp_path, "demo", tmp_path, []).splitlines() if "#SBATCH" in line]
    assert {"#SBATCH --gres=gpu:a100:2", "#SBATCH --exclude='n[1-4,7],n9'", "#SBATCH --time=INFINITE"} <= set(asked)
    assert not any("--gpus-per-node" in line for line in asked)


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\u2028", "\udcff"])
def test_a_name_cannot_become_a_command_of_the_script(tmp_path, character):
    bad = f"a{character}touch x"
    for job, name, folder in (
        (tmp_path / bad, "demo", tmp_path),
        (tmp_path, bad, tmp_path),
        (tmp_path, "d", Path(bad)),
    ):
        with pytest.raises(ConfigError, match="which a job script cannot hold"):
            render(CLUSTER, 1, job, name, folder, [])
    with pytest.raises(ConfigError, match="which a job script cannot hold"):
        render(dataclasses.replace(CLUSTER, partition=bad), 1, tmp_path, "demo", tmp_path, [])


def test_every_variable_of_the_script_is_refused_in_the_environment(tmp_path):
    text = render(CLUSTER, 2, tmp_path, "demo", tmp_path, [1, 2])
    code = re.sub(r'#.*|"[^"\n]*"', "", text.partition("\nsay()")[2])
    names = {"LLADA_JOB", "LLADA_ATTEMPT", "LLADA_RENDEZVOUS", *re.findall(r"(?:^|\s)([a-z_]+)\+?=(?!=)", code)}
    for words in re.findall(r"\b(?:local|read -r|for) ([^;\n<]+)", code):
        names |= set(re.findall(r"\b[a-z_]+\b(?==|\s|$)", words.partition(" in ")[0]))
    assert {"port", "step", "changes", "reason", "try", "status", "count"} <= names
    refused = []
    check_environment([f"{name}=x" for name in sorted(names)], lambda key, message: refused.append(key))
    assert len(refused) == len(names), sorted(names)


def test_a_line_that_goes_on_does_not_swallow_the_script(script):
    cluster = dataclasses.replace(CLUSTER, setup=["true \\"])
    assert script.run(cluster, AGENT=says("done"))[0] == 0, script.output


@pytest.mark.parametrize(
    ("agent", "settings", "code", "calls"),
    [
        (says("done"), {}, 0, []),
        (says("stopped"), {}, 0, []),
        (says("failed"), {}, 1, []),
        (says("requeue"), {}, 0, REQUEUE),
        (says("requeue") + "; touch \"$LLADA_JOB/controller-away\"", {}, 0, REQUEUE),
        (says("requeue"), {"STATE": "COMPLETING"}, 1, []),
        (says("requeue", 2), {"attempt": 2}, 1, []),
        (says("requeue", 1), {"attempt": 1}, 0, REQUEUE),
        (says("exclude n2"), {}, 0, ["requeue 17", "update JobId=17 ExcNodeList=n2"]),
        (
            says("exclude n2,n4"),
            {"EXCLUDED": "n[7-8]"},
            0,
            ["requeue 17", "update JobId=17 ExcNodeList=n[7-8],n2,n4"],
        ),
        (says("requeue"), {"EXCLUDED": "n7"}, 0, REQUEUE),
        # no spare node: on with the largest size that the layout fits, and back to the full one once it is there again
        (
            says("exclude n2"),
            {"PARTITION": "n1 n2"},
            0,
            ["requeue 17", "update JobId=17 ExcNodeList=n2 NumNodes=1-1 NumTasks=1"],
        ),
        (
            says("requeue"),
            {"PARTITION": "n1"},
            0,
            ["requeue 17", "update JobId=17 NumNodes=1-1 NumTasks=1"],
        ),
        (
            says("requeue"),
            {"SLURM_JOB_NUM_NODES": "1"},
            0,
            ["requeue 17", "update JobId=17 NumNodes=2-2 NumTasks=2"],
        ),
        (says("requeue"), {"PARTITION": ""}, 0, REQUEUE),
        ("touch \"$LLADA_JOB/stop\"; " + says("requeue"), {}, 0, []),
    ],
)  # fmt: skip
def test_a_verdict_is_acted_on(script, agent, settings, code, calls):
    assert script.run(AGENT=agent, **settings) == (code, calls), script.output


@pytest.mark.parametrize("verdict", ["requeue", "exclude n2"])
def test_a_job_that_may_not_be_queued_again_fails(script, verdict):
    assert script.run(dataclasses.replace(CLUSTER, requeue=False), AGENT=says(verdict)) == (1, [])


def test_a_bad_node_keeps_the_agents_from_starting(script):
    code, calls = script.run(PREFLIGHT=says("exclude n2"), AGENT=says("done"))
    assert (code, calls[1]) == (0, "update JobId=17 ExcNodeList=n2")
    assert [line.split()[0].rpartition(".")[2] for line in script.lines("started")] == ["preflight"]


def test_without_a_verdict_a_job_goes_on_only_where_something_had_started(script):
    assert script.run(AGENT="exit 1") == (1, [])
    noted = 'mkdir "$LLADA_JOB/events"; echo \'{"time": 1, "attempt": 1, "node": "n1"}\' > $LLADA_JOB/events/n1.jsonl'
    assert script.run(AGENT=noted.replace("$LLADA_JOB/events/n1", '"$LLADA_JOB"/events/n1')) == (1, [])  # of attempt 1
    assert script.run(attempt=1) == (0, REQUEUE)
    assert JobDirectory(script.job).newest_attempt() == 1


KILLED = 'mkdir -p "$LLADA_JOB/events"; echo "{\\"attempt\\": 0, \\"node\\": 1}" > "$LLADA_JOB/events/n.jsonl"; exit 1'


@pytest.mark.parametrize("agent", [KILLED, "printf 'requeue\\nasked\\n' > \"$LLADA_JOB/verdict-$LLADA_ATTEMPT\""])
def test_again_and_again_without_a_newer_checkpoint_ends_the_job(script, agent):
    """Killed for want of memory, or with too little time to save even once; what gets on is queued again for ever."""
    cluster = dataclasses.replace(CLUSTER, max_restarts=2, max_requeues=100)
    codes = [script.run(cluster, attempt, AGENT=agent)[0] for attempt in range(2)]
    for attempt, step in enumerate((10, 20, 30, 40, 40, 40), start=2):
        (script.job.parent.parent / "checkpoints" / f"step-{step:08}").mkdir(parents=True, exist_ok=True)
        codes.append(script.run(cluster, attempt, AGENT=agent)[0])
    assert codes == [0] * 7 + [1]
    verdict = JobDirectory(script.job).read_verdict(7)
    assert verdict is not None and verdict.status == "failed"
    assert "3 attempts without a newer checkpoint" in verdict.reason


def test_bad_nodes_do_not_count_as_attempts_without_a_checkpoint(script):
    cluster = dataclasses.replace(CLUSTER, max_restarts=1, max_requeues=100)
    agent = "printf 'exclude n2\\nbad\\n' > \"$LLADA_JOB/verdict-$LLADA_ATTEMPT\""
    assert [script.run(cluster, attempt, AGENT=agent)[0] for attempt in range(3)] == [0, 0, 0]


def test_nodes_that_do_not_start_end_a_job_only_the_first_time(script):
    """Later, a node has died since the last attempt: SLURM will have noticed by the next one."""
    assert script.run(AGENT="exit 1") == (1, [])
    assert JobDirectory(script.job).read_verdict(0).status == "failed"
    assert script.run(attempt=1, AGENT="exit 1") == (0, REQUEUE)


def test_a_signal_while_the_environment_is_set_up_is_not_lost(script):
    """It reaches even a step that is just being started."""
    (script.folder / "bin" / "sleep").unlink()  # what is sent again a second later is sent a second later
    setup = ['touch "$LLADA_JOB/ready"; /bin/sleep 0.5']
    process = script.start(dataclasses.replace(CLUSTER, setup=setup), PREFLIGHT="exec /bin/sleep 100")
    wait_for((script.job / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    sent = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert (process.returncode, script.lines("calls")) == (0, REQUEUE), output
    assert time.monotonic() - sent < 60


def test_a_signal_reaches_the_nodes_and_the_script_waits_for_them(script):
    """USR1 twice and TERM: what a time limit followed by the end of an allocation looks like."""
    agent = "trap 'echo asked >> \"$LLADA_JOB/asked\"' USR1; touch \"$LLADA_JOB/ready\"; " \
        "while [ \"$(wc -l 2>/dev/null < \"$LLADA_JOB/asked\" || echo 0)\" -lt 3 ]; do /bin/sleep 0.05; done; " \
        + says("requeue")  # fmt: skip
    process = script.start(AGENT=agent)
    for number, sent in enumerate((signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)):
        wait_for(lambda: (script.job / "ready").exists() and len(script.lines("asked")) >= number)  # noqa: B023
        process.send_signal(sent)
    output = process.communicate(timeout=120)[0]
    assert (process.returncode, script.lines("calls")) == (0, REQUEUE), output


def test_a_job_asked_to_end_during_the_preflight_is_queued_again_without_training(script):
    process = script.start(
        PREFLIGHT="touch \"$LLADA_JOB/ready\"; trap 'exit 1' USR1; while :; do /bin/sleep 0.05; done"
    )
    wait_for((script.job / "ready").exists)
    time.sleep(0.2)  # the trap is set after the file is there
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert (process.returncode, script.lines("calls")) == (0, REQUEUE), output
    assert len(script.lines("started")) == 1


def test_the_rendezvous_is_on_the_first_node_at_a_port_that_nobody_has(script):
    port = 20000 + 17 * 16
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
        except OSError:
            pass  # somebody else has it: as good
        else:
            taken.listen()
        script.run(AGENT=says("done"))
    _, attempt, rendezvous = script.lines("started")[1].split()
    assert (attempt, rendezvous.partition(":")[0]) == ("0", "localhost")
    assert int(rendezvous.partition(":")[2]) > port


def test_a_first_node_without_a_name_ends_the_job(script):
    """Falling back to another name would make every node wait for itself."""
    assert script.run(HEAD="", AGENT=says("done"))[0] == 1
    assert script.lines("started") == []


def wait_for(condition, limit_s=120.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_environment_of_the_cluster_reaches_the_nodes(script):
    cluster = dataclasses.replace(CLUSTER, environment=["OURS=yes"], setup=["cd /", "echo $UNSET_VARIABLE", "set -e"])
    assert script.run(cluster, AGENT=says("done"))[0] == 0, script.output
    assert all(line.endswith(" yes") for line in script.lines("started"))
    assert os.environ.get("OURS") is None
