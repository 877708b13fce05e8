"""What a job that went through something must show at its end."""

import pytest

from benchmarks import observation


def end_of(slurm, job, limit_s=480):
    """SLURM's state of the job once it is over."""
    observation.wait_until(lambda: slurm.state(job.id) in observation.OVER, f"the end of job {job.id}", limit_s)
    return slurm.state(job.id)


def output_of(job) -> str:
    return (job.directory / "job.out").read_text(errors="replace")


def assert_same_to_the_last_bit(calm, job):
    """Loss curve and every tensor of the last checkpoint."""
    assert observation.curve(job.output_dir) == observation.curve(calm)
    last = observation.final_checkpoint(calm)
    assert observation.different_tensors(last, job.output_dir / "checkpoints" / last.name) == []


def assert_same_curve(calm, job, moved_at):
    """The curve of a run that went on under another layout after step `moved_at`.

    Every loss agrees to 1e-5, and so does the gradient norm up to the first step under the new layout. After it,
    weights that differ in their last bits give norms that drift apart, faster on some processors than on others.
    """
    expected, found = observation.curve(calm), observation.curve(job.output_dir)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for before, after in zip(expected, found, strict=True):
        assert after.keys() == before.keys()
        norms = set() if after["step"] > moved_at + 1 else {"grad_norm"}
        for key in before.keys() - {"grad_norm"} | norms:
            assert after[key] == pytest.approx(before[key], rel=1e-5), (after["step"], key)


def status_of(place, job) -> dict:
    """The job in `llada jobs`."""
    (found,) = place.must("jobs", str(job.id))["jobs"]
    return found
