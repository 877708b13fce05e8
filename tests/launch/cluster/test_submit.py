"""`llada submit` up to the call of sbatch: what it refuses, what a dry run shows, what it writes."""

import json
import os
import sys
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.launch.cluster.config import ClusterConfig, ContainerConfig, load_cluster
from llada_megatron.launch.cluster.fit import check_mounts, layout_warnings, nodes_needed
from llada_megatron.launch.cluster.job import JobDirectory
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"
SMALL = ["layout.data_parallel=4", "training.micro_batch_size=4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the demo's run and its data, and a SLURM whose programs do what files say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    prefix = tmp_path / "runs" / "demo" / "data" / "stdlib"
    prefix.parent.mkdir(parents=True)
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{prefix}{suffix}").touch()
    install(programs, "sbatch", "echo 41")
    install(programs, "squeue", "echo '41|RUNNING|None|n[1-2]|1:00:00'")
    install(programs, "sinfo", "echo 'main*|main|4|infinite'")
    return tmp_path


def install(programs, name, text):
    (programs / name).write_text(f"#!/bin/sh\n{text}\n")
    (programs / name).chmod(0o755)


def submit(*arguments):
    return cli.main(["submit", str(RUNS / "demo.yaml"), "--cluster", "cpu", *SMALL, *arguments])


def test_a_submitted_job_has_its_files_and_is_found_again(place, capsys):
    assert submit("--json", "training.steps=700") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["job_id"], told["nodes"], told["ranks"]) == (41, 2, 4)
    job = JobDirectory(Path(told["directory"]))
    assert job.path.parent == place / "runs" / "demo" / "jobs"
    assert load_run(job.run).training.steps == 700
    assert load_cluster(job.cluster) == load_cluster("cpu")
    assert f"--chdir={place}" in job.script.read_text()
    assert cli.main(["jobs", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["jobs"]
    assert (found["job_id"], found["state"], found["steps"]) == (41, "RUNNING", 700)


def test_two_jobs_must_not_write_one_run(place, capsys):
    assert submit() == 0
    assert submit() == 1
    assert "runs/demo is the run of job 41, which is RUNNING" in capsys.readouterr().err
    install(place / "bin", "squeue", "echo '41|COMPLETED|None|n[1-2]|1:00:00'")
    assert submit() == 0


def test_two_submissions_at_one_moment_make_one_job(place, capsys):
    """The second one comes while sbatch is at work for the first: nothing is on record yet."""
    again = f"{sys.executable} -m llada_megatron.cli submit {RUNS / 'demo.yaml'} --cluster cpu {' '.join(SMALL)}"
    install(place / "bin", "sbatch", f"{again} > {place}/second 2>&1; echo $? >> {place}/codes; echo 41")
    assert submit() == 0
    assert (place / "codes").read_text() == "1\n"
    assert "another `llada submit` is submitting" in (place / "second").read_text()


def test_a_job_that_cannot_be_put_on_record_is_told_of(place, capsys):
    (place / "state").write_text("not a directory")
    assert submit() == 0
    told = capsys.readouterr()
    assert told.out.startswith("job 41: ") and "could not be recorded" in told.err
    assert cli.main(["jobs", "runs/demo"]) == 0


def test_variables_of_the_shell_that_sbatch_reads_as_options_do_not_count(place, monkeypatch, capsys):
    for name in ("SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "SLURM_JOB_ID", "LLADA_ATTEMPT"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    install(place / "bin", "sbatch", f"env > {place}/environment; echo 41")
    assert submit("output_dir=.") == 0
    names = {line.partition("=")[0] for line in (place / "environment").read_text().splitlines()}
    assert "SLURM_CONF" in names and not names & {
        "SBATCH_PARTITION",
        "SRUN_CPUS_PER_TASK",
        "SLURM_JOB_ID",
        "LLADA_ATTEMPT",
    }
    assert f": {place.name} on 2 nodes" in capsys.readouterr().out


def test_what_slurm_refuses_leaves_nothing_behind(place, capsys):
    install(place / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert submit() == 2
    assert "partitions of this cluster: main" in capsys.readouterr().err
    assert list((place / "runs" / "demo" / "jobs").glob("*/")) == []
    assert not (place / "state").exists()


def test_without_sbatch_only_a_dry_run_works_also_without_the_data(place, capsys):
    for program in ("sbatch", "squeue", "sinfo"):
        (place / "bin" / program).unlink()
    if any((Path(folder) / "sbatch").exists() for folder in ("/usr/bin", "/bin")):
        os.environ["PATH"] = str(place / "bin")  # put back by the fixture
    (place / "runs" / "demo" / "data" / "stdlib.idx").unlink()
    assert submit() == 1
    assert "this machine has no sbatch" in capsys.readouterr().err
    assert submit("--dry-run") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in shown.out
    assert "warning: no prepared data at runs/demo/data/stdlib" in shown.err
    assert not (place / "runs" / "demo" / "jobs").exists()


def test_a_layout_that_does_not_fill_nodes_is_refused_with_the_arithmetic():
    run = load_run(RUNS / "demo.yaml", ["layout.data_parallel=2", "training.micro_batch_size=2"])
    cluster = ClusterConfig(ranks_per_node=8)
    with pytest.raises(ConfigError) as error:
        nodes_needed(run, cluster, "ours.yaml")
    assert "data_parallel 2 = 2 ranks, but a node of ours.yaml has 8" in str(error.value)
    assert "use layout.data_parallel=8 (1 node)" in str(error.value)
    assert nodes_needed(run, ClusterConfig(ranks_per_node=2), "ours.yaml") == 1


@pytest.mark.parametrize("cluster", ["dgx-h100", "h200-8x"])
@pytest.mark.parametrize(
    ("name", "nodes"), [("llada-moe-7b-a1b-pretrain", 8), ("llada2-flash-pretrain", 64), ("llada-8b-pretrain", 8)]
)
def test_the_large_runs_are_ready_to_submit(place, capsys, cluster, name, nodes):
    assert cli.main(["submit", str(RUNS / f"{name}.yaml"), "--cluster", cluster, "--dry-run", "--json"]) == 0
    out = capsys.readouterr().out
    assert f"#SBATCH --nodes={nodes}\n" in out and "#SBATCH --gpus-per-node=8\n" in out
    assert json.loads(out.splitlines()[-1]) == {"nodes": nodes, "ranks": 8 * nodes, "submitted": False}
    assert layout_warnings(load_run(RUNS / f"{name}.yaml"), load_cluster(cluster)) == []
    assert load_cluster(cluster).gpu in cluster  # what memory is checked against


def test_a_container_must_see_the_data_where_the_host_has_it(tmp_path):
    run = load_run(RUNS / "demo.yaml", [f"output_dir={tmp_path}/runs/x", f"data.sets.0.path={tmp_path}/data/x"])

    def check(*mounts):
        container = ContainerConfig(image="x", mounts=list(mounts))
        check_mounts(run, ClusterConfig(ranks_per_node=2, container=container), tmp_path)

    check(f"{tmp_path}:{tmp_path}")
    check(str(tmp_path.parent))
    with pytest.raises(ConfigError, match=r"data/x.* cannot be seen in the container"):
        check(f"{tmp_path}/runs:{tmp_path}/runs:rw")
    with pytest.raises(ConfigError, match=r"cannot be seen"):
        check(f"{tmp_path}:/elsewhere")


def test_tensor_parallelism_across_nodes_is_warned_of():
    run = load_run(RUNS / "llada-8b-pretrain.yaml", ["layout.tensor_parallel=4", "layout.data_parallel=16"])
    (warning,) = layout_warnings(run, ClusterConfig(ranks_per_node=2))
    assert "tensor_parallel 4 does not divide the 2 ranks of a node" in warning


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_a_line_break_in_a_path_is_refused_before_a_script_is_written(place, capsys, options):
    assert submit(*options, 'output_dir="x/a\\ntouch PWNED\\n#"') == 2
    said = capsys.readouterr()
    assert "output_dir: expected one line of text" in said.err and not said.out
    folder = place / "a\ntouch PWNED\n#"
    folder.mkdir()
    os.chdir(folder)
    assert submit("--dry-run") == 2
    assert "touch PWNED" not in capsys.readouterr().out


def test_an_unbalanced_quote_is_found_in_the_dry_run(place, capsys):
    (place / "c.yaml").write_text("base: cpu\nsetup:\n  - module load a\n  - echo 'b\n")
    arguments = ["submit", str(RUNS / "demo.yaml"), "--cluster", "c.yaml", *SMALL, "--dry-run"]
    assert cli.main(arguments) == 2
    assert "c.yaml:4: setup.1: bash cannot read this: unexpected EOF" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "recipe", "why"),
    [
        ("dgx-h100", "mxfp8", "mxfp8 cannot run on H100 SXM 80 GB (gpu of dgx-h100): recipe mxfp8 needs compute"),
        ("cpu", "tensorwise", "tensorwise needs GPUs with FP8, and nodes of cpu have none"),
        ("dgx-h100", "tensorwise", None),
    ],
)
def test_fp8_that_the_cluster_cannot_run_is_refused_also_in_a_dry_run(place, capsys, cluster, recipe, why):
    run = str(RUNS / "llada-8b-pretrain.yaml")
    found = cli.main(["submit", run, "--cluster", cluster, "--dry-run", f"training.fp8.recipe={recipe}"])
    said = capsys.readouterr()
    if why is None:
        assert found == 0 and "fp8" not in said.err
        return
    assert found == 2 and not said.out
    assert "training.fp8.recipe: " + why in said.err and "remove training.fp8" in said.err
