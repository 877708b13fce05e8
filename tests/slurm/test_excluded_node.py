"""The script of a job on a real SLURM, with a stand-in for what runs on the nodes."""

import time

from llada_megatron.launch.cluster.config import ClusterConfig
from llada_megatron.launch.cluster.script import render

NODE = """#!/bin/bash
[ "$SLURM_NODEID" = 0 ] || exit 0
case $3/$LLADA_ATTEMPT in
    *preflight/0) printf 'exclude %s\\nbad\\n' "$OTHER" >"$LLADA_JOB/verdict-0" ;;
    *agent/1) printf 'requeue\\nsaved\\n' >"$LLADA_JOB/verdict-1" ;;
    *agent/2) printf 'done\\nall\\n' >"$LLADA_JOB/verdict-2" ;;
esac
"""


def test_a_job_comes_back_without_the_excluded_node_and_is_never_held(slurm, tmp_path):
    """There is no third node: on one, which the layout allows, and on with that one after a time limit."""
    program, job = tmp_path / "python", tmp_path / "the run" / "jobs" / "one"
    program.write_text(NODE)
    program.chmod(0o755)
    job.mkdir(parents=True)
    cluster = ClusterConfig(
        ranks_per_node=1, exclusive=False, python=str(program), environment=[f"OTHER={slurm.nodes[1]}"]
    )
    (job / "job.sbatch").write_text(render(cluster, 2, job, "demo", tmp_path, [1, 2]))
    number, states = slurm.run("sbatch", "--parsable", str(job / "job.sbatch")), set()
    deadline = time.monotonic() + 300
    while (state := slurm.state(number)) not in ("COMPLETED", "FAILED", "CANCELLED"):
        states.add(state)
        said = (job / "job.out").read_text() if (job / "job.out").exists() else ""
        assert time.monotonic() < deadline and "HOLD" not in state, (states, said)
        time.sleep(0.2)
    said = (job / "job.out").read_text()
    assert state == "COMPLETED", said
    assert f"without {slurm.nodes[1]}, with NumNodes=1-1" in said
    assert slurm.run("squeue", "-h", "-t", "all", "-j", number, "-o", "%x %N") == f"{slurm.nodes[1]} {slurm.nodes[0]}"
    assert (job / "attempt").read_text() == "2\n"
