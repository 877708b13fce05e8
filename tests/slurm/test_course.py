"""A job from its submission to its end, on two nodes with two ranks each."""

from benchmarks import observation
from tests.slurm.checks import assert_same_curve, end_of, output_of, status_of


def test_submitted_job_trains_on_two_nodes_and_jobs_follows_it(place, slurm, calm):
    steps = observation.last_step(calm)
    held = place.cluster("held.yaml", ranks_per_node=2, sbatch_options=["--hold"])
    job = place.submit("layout.data_parallel=4", "output_dir=course", cluster=held)
    waiting = status_of(place, job)
    assert (waiting["state"], waiting["step"], waiting["steps"]) == ("PENDING", 0, steps)
    assert "JobHeldUser" in waiting["note"]

    slurm.run("scontrol", "release", str(job.id))
    step = observation.wait_for_step(job.output_dir, 2)
    running = status_of(place, job)
    assert running["state"] == "RUNNING"
    assert step <= running["step"] < steps
    assert running["loss"] > 0
    assert running["tokens_per_second"] > 0
    assert running["seconds_left"] > 0
    assert len(observation.ranks(slurm)) == 4
    assert [len(observation.ranks(slurm, node)) for node in slurm.nodes] == [2, 2]

    second = place.llada("submit", "run.yaml", "--cluster", "cluster.yaml", "output_dir=course")
    assert second.returncode == 1
    assert f"job {job.id}" in second.stderr
    assert "RUNNING" in second.stderr

    assert end_of(slurm, job) == "COMPLETED", output_of(job)
    done = status_of(place, job)
    assert (done["state"], done["step"], done["requeues"], done["restarts"]) == ("done", steps, 0, 0)
    assert done["loss"] == observation.curve(job.output_dir)[-1]["loss"]
    assert f"trained to step {steps}" in place.llada("logs", str(job.id)).stdout
    assert_same_curve(calm, job, moved_at=0)
