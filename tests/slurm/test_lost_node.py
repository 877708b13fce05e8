"""A node that is gone for good: training goes on without it, with half of the data-parallel size."""

import time

from benchmarks import fault_run, observation
from tests.slurm.checks import assert_same_curve, end_of, output_of


def test_training_goes_on_with_the_nodes_that_are_left(slurm, place, calm):
    shrinking = place.cluster("shrinking.yaml", lost_node="shrink")
    job = place.submit("output_dir=smaller", "layout.expert_parallel=1", cluster=shrinking)
    observation.wait_for_step(job.output_dir, 7)
    since, offset = time.time(), observation.output_size(job.directory)
    slurm.set_node(slurm.nodes[1], "down")
    try:
        whole = observation.newest_whole(job.output_dir)
        moved_at = fault_run.wait_for_start(slurm, job, since, offset)
        assert moved_at >= whole > 0
        assert observation.events(job.directory, "start")[-1]["nodes"] == slurm.nodes[:1]
        assert slurm.state(job.id) == "RUNNING", "in the allocation that is left"
        assert end_of(slurm, job) == "COMPLETED", output_of(job)
    finally:
        slurm.set_node(slurm.nodes[1], "resume")
    assert slurm.nodes[1] in str(observation.events(job.directory, "lost"))
    assert_same_curve(calm, job, moved_at)
