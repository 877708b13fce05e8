"""What SLURM's programs print (22.05.8) becomes jobs and messages that say what to change."""

import os
import stat
from pathlib import Path

import pytest

from llada_megatron.launch.cluster import slurm
from llada_megatron.launch.cluster.config import ClusterConfig
from llada_megatron.launch.cluster.fit import check_partition
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

REFUSALS = [
    (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
        ConfigError,
        ["c.yaml: partition:", "invalid partition specified: nope", "partitions of this cluster: main, gpu"],
    ),
    (
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
        ConfigError,
        ["c.yaml: account:", "sacctmgr"],
    ),
    ("sbatch: error: Invalid --time specification\n", ConfigError, ["c.yaml: time:", "days-hours"]),
    (
        "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)\n",
        ConfigError,
        ["c.yaml: time:", "exceeds some limit", "longest time of each partition"],
    ),
    (
        "sbatch: error: Batch job submission failed: Invalid feature specification\n",
        ConfigError,
        ["c.yaml: constraint:"],
    ),
    ("sbatch: error: Invalid generic resource (gres) specification\n", ConfigError, ["c.yaml: gpus_per_node:"]),
    (
        "sbatch: error: Memory specification can not be satisfied\n"
        "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
        ConfigError,
        ["c.yaml: memory_per_node:", "Memory specification can not be satisfied; Batch job"],
    ),
    (
        "sbatch: error: Batch job submission failed: Node count specification invalid\n",
        ConfigError,
        ["number of nodes"],
    ),
    ("sbatch: error: Batch job submission failed: Invalid node name specified\n", ConfigError, ["c.yaml: exclude:"]),
    ("sbatch: error: Batch job submission failed: Something new\n", ConfigError, ["refuses the job", "Something new"]),
    (
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
        ResourceError,
        ["Unable to contact slurm controller", "scontrol ping"],
    ),
]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program with a given behaviour first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def install(name, out="", err="", code=0):
        path = tmp_path / name
        (tmp_path / f"{name}.out").write_text(out)
        (tmp_path / f"{name}.err").write_text(err)
        lines = [
            "#!/bin/sh",
            'echo "$@" > "$0.called"',
            "env > $0.env",
            'cat "$0.out"',
            'cat "$0.err" >&2',
            f"exit {code}",
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return install


@pytest.mark.parametrize(("text", "kind", "said"), REFUSALS)
def test_a_refusal_names_the_key_and_what_to_do(program, text, kind, said):
    program("sbatch", err=text, code=1)
    program("sinfo", out="main*|main|2|infinite\ngpu|gpu|9|1-00:00:00\n")
    with pytest.raises(kind) as error:
        slurm.submit(Path("job.sbatch"), "c.yaml")
    assert all(part in str(error.value) for part in said), error.value
    assert "sbatch: error" not in str(error.value)


def test_a_job_submitted_from_inside_a_job_inherits_nothing_of_it(program, monkeypatch):
    sbatch = program("sbatch", out="4711;cluster\n")
    for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_CONF", "LLADA_JOB"):
        monkeypatch.setenv(name, "outer")
    monkeypatch.delenv("LLADA_REQUIRE_SLURM", raising=False)  # the suite's own, of no job
    assert slurm.submit(Path("job.sbatch"), "c.yaml") == 4711
    seen = Path(f"{sbatch}.env").read_text()
    assert "SLURM_CONF=outer" in seen and "SLURM_JOB_ID" not in seen and "RESTART" not in seen and "LLADA" not in seen


def test_the_queue_is_read_and_what_slurm_has_forgotten_is_left_out(program):
    program(
        "squeue", out="3|RUNNING|None|n[1-2]|1:02:03\n4|PENDING|BeginTime||1-00:00:00\n5|TIMEOUT|TimeLimit|n1|0:00\n"
    )
    jobs = slurm.queue([3, 4, 5, 6])
    assert sorted(jobs) == [3, 4, 5]
    assert (jobs[3].state, jobs[3].nodes, jobs[3].is_live) == ("RUNNING", "n[1-2]", True)
    assert (jobs[4].reason, jobs[4].is_live, jobs[5].is_live) == ("BeginTime", True, False)
    program("squeue", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert slurm.queue([6]) == {}
    program("squeue", err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", code=1)
    with pytest.raises(ResourceError, match="Unable to contact slurm controller"):
        slurm.queue([6])


def test_a_program_that_does_not_answer_ends_the_command(program, monkeypatch, tmp_path):
    (program("squeue")).write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "LIMIT_S", 0.2)
    with pytest.raises(ResourceError, match=r"squeue has not answered"):
        slurm.queue([1])


def test_a_job_that_a_partition_can_never_run_is_refused_where_slurm_would_queue_it(program):
    program("sinfo", out="main*|main|2|infinite\ngpu|gpu|9|1-00:00:00\n")
    cluster = ClusterConfig(ranks_per_node=1)
    assert check_partition(cluster, 2, "c.yaml") == []
    with pytest.raises(ConfigError, match=r"fills 3 nodes, but partition main has 2"):
        check_partition(cluster, 3, "c.yaml")
    longer = ClusterConfig(ranks_per_node=1, partition="gpu", time="2-00:00:00")
    (warning,) = check_partition(longer, 9, "c.yaml")
    assert "2-00:00:00 is more than the 1-00:00:00 that gpu allows" in warning
