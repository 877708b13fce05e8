"""What cannot work is said in plain words: before the job is submitted, or by its first seconds."""

import sys

from tests.slurm.checks import end_of, output_of, status_of


def refused(place, cluster, *overrides) -> str:
    done = place.llada("submit", "run.yaml", "--cluster", cluster, "output_dir=refused", *overrides)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not list((place.folder / "refused" / "jobs").glob("[0-9]*"))
    return done.stderr


def test_partition_that_does_not_exist(place):
    said = refused(place, place.cluster("no-partition.yaml", partition="gpus"))
    assert "invalid partition" in said
    assert "gpus" in said
    assert "main" in said, "the partitions that there are"


def test_layout_that_does_not_fill_nodes(place):
    said = refused(place, place.cluster("three.yaml", ranks_per_node=3))
    assert "ranks_per_node" in said
    assert "3" in said


def test_unknown_key_of_the_cluster(place):
    said = refused(place, place.cluster("typo.yaml", partitoin="main"))
    assert "partitoin" in said
    assert "typo.yaml" in said


def test_another_version_on_one_node_ends_the_job_and_names_it(place, slurm):
    """The second node's interpreter finds another megatron-core than the first one's."""
    other = place.folder / "other" / "megatron_core-0.1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.1.0\n")
    wrapper = place.folder / "python-of-node"
    wrapper.write_text(
        f'#!/bin/bash\n[ "$SLURMD_NODENAME" = {slurm.nodes[1]} ] && export PYTHONPATH={other.parent}:$PYTHONPATH\n'
        f'exec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    job = place.submit("output_dir=versions", cluster=place.cluster("versions.yaml", python=str(wrapper)))
    assert end_of(slurm, job) == "FAILED"
    said = status_of(place, job)
    assert said["state"] == "failed"
    assert slurm.nodes[1] in said["note"], output_of(job)
    assert "0.1.0" in said["note"]
    assert said["step"] == 0
