"""`llada submit`: check a run against a cluster, write its job, and give it to SLURM."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import LladaError, ResourceError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.launch.cluster.job import JobDirectory
    from llada_megatron.launch.cluster.registry import JobRecord
    from llada_megatron.llada_moe.config.run import RunConfig

EXAMPLES = """\
examples:
  llada submit llada-moe-7b-a1b-pretrain --cluster dgx-h100 --dry-run
  llada submit run.yaml --cluster clusters/ours.yaml training.steps=1000
  llada jobs                   the state of your jobs
  llada logs 4711 --follow     the output of a job
  llada stop 4711              save and end the job; submit the same run again to go on

The job is queued again before its time ends and after faults, and goes on from the newest checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada submit`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, or a name in configs/runs")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values laid over the file's")
    parser.add_argument(
        "--cluster", metavar="CLUSTER", required=True, help="YAML file of the cluster, or a name in configs/clusters"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the script and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Submit; returns the exit code."""
    from llada_megatron.launch.cluster import fit, registry
    from llada_megatron.launch.cluster.config import load_cluster
    from llada_megatron.launch.cluster.fit import node_counts
    from llada_megatron.launch.cluster.script import render
    from llada_megatron.launch.resources import check_inputs
    from llada_megatron.llada_moe.config import load_run

    run, cluster = load_run(args.config, args.overrides, message), load_cluster(args.cluster)
    check_inputs(args.config, run)
    nodes = fit.nodes_needed(run, cluster, args.cluster)
    fit.check_fp8(run, cluster, args.cluster)
    for warning in fit.layout_warnings(run, cluster):
        message(f"warning: {warning}")
    output_dir = Path(os.path.abspath(run.output_dir))  # so that `.` and `..` get the name of their folder
    job = registry.new_directory(output_dir)
    smaller = node_counts(run, cluster.ranks_per_node, nodes)
    script = render(cluster, nodes, job.path, output_dir.name, Path.cwd(), smaller)
    if args.dry_run:
        return _show(script, run, cluster, nodes, args)
    _check(run, cluster, nodes, args.cluster)
    with registry.exclusive_submission(output_dir):
        _check_no_live_job(run)  # once more: another submission may have been faster
        record = registry.JobRecord(
            job_id=_submit(run, cluster, job, script, args.cluster),
            name=output_dir.name,
            submitted=time.time(),
            output_dir=str(output_dir),
            nodes=nodes,
            ranks=run.layout.world_size,
            steps=run.training.steps,
            cluster=args.cluster,
        )
        try:
            registry.write(job, record)
        except OSError as error:  # a full disk, or a home directory that cannot be written; the job exists nevertheless
            message(f"warning: job {record.job_id} could not be recorded, so `llada jobs` may not list it: {error}")
    return _tell(job, record, args)


def _check(run: RunConfig, cluster: ClusterConfig, nodes: int, cluster_file: str) -> None:
    """Check everything that can be known before anything is written. Raises LladaError."""
    from llada_megatron.launch.cluster import slurm
    from llada_megatron.launch.cluster.fit import check_partition

    slurm.check_present()
    for check in _checks(run, cluster):
        check()
    for warning in check_partition(cluster, nodes, cluster_file):
        message(f"warning: {warning}")


def _submit(run: RunConfig, cluster: ClusterConfig, job: JobDirectory, script: str, cluster_file: str) -> int:
    """Write the job's directory and give it to SLURM; returns its id.

    Raises:
        LladaError: SLURM refuses the job; the directory is removed again.
    """
    from llada_megatron.launch.cluster import slurm
    from llada_megatron.llada_moe.config import dump_yaml

    job.path.mkdir(parents=True)
    try:
        job.run.write_text(dump_yaml(run), "utf-8")
        job.cluster.write_text(dump_yaml(cluster), "utf-8")
        job.script.write_text(script, "utf-8")
        return slurm.submit(job.script, cluster_file)
    except LladaError:
        shutil.rmtree(job.path)
        raise


def _checks(run: RunConfig, cluster: ClusterConfig) -> list[Callable[[], None]]:
    """The checks of what the job needs when it starts; each raises an LladaError where it fails."""
    from llada_megatron.launch import run_lock
    from llada_megatron.launch.cluster.fit import check_mounts
    from llada_megatron.launch.resources import check_callbacks, check_data, check_space, check_weights

    return [
        lambda: _check_gpu(run, cluster),
        lambda: check_callbacks(run),
        lambda: _check_no_live_job(run),
        lambda: run_lock.check_free(run.output_dir),
        lambda: check_data(run),
        lambda: check_weights(run),
        lambda: check_space(run),
        lambda: check_mounts(run, cluster, Path.cwd()),
    ]


def _check_gpu(run: RunConfig, cluster: ClusterConfig) -> None:
    """Refuse, or warn of, a run that is too large for the cluster's GPUs. Raises LladaError."""
    from llada_megatron.launch.gpu_memory import check_gpu_memory
    from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu

    warning = check_gpu_memory(run, load_gpu(cluster.gpu)) if cluster.gpu else None
    if warning:
        message(f"warning: {warning}")


def _check_no_live_job(run: RunConfig) -> None:
    """Refuse a run that a live job is writing to. Raises ResourceError."""
    from llada_megatron.launch.cluster import registry, slurm

    jobs = registry.jobs_of_run(Path(run.output_dir))
    if not jobs:
        return
    queued = slurm.queue([job.record.job_id for job in jobs])
    for job in jobs:
        found = queued.get(job.record.job_id)
        if found is not None and found.is_live:
            raise ResourceError(
                f"{run.output_dir} is the run of job {found.job_id}, which is {found.state} in SLURM; two jobs must "
                f"not write to one run: end that one with `llada stop {found.job_id}`, or give this one another "
                "output_dir"
            )


def _show(script: str, run: RunConfig, cluster: ClusterConfig, nodes: int, args: argparse.Namespace) -> int:
    """Print the script, and as warnings what would keep it from being submitted now."""
    from llada_megatron.launch.cluster.fit import count_of_nodes

    for check in _checks(run, cluster):
        try:
            check()
        except LladaError as error:
            message(f"warning: {error}")
    sys.stdout.write(script)
    message(f"not submitted: {count_of_nodes(nodes)} x {cluster.ranks_per_node} = {run.layout.world_size} ranks")
    if args.json:
        emit_json({"nodes": nodes, "ranks": run.layout.world_size, "submitted": False})
    return 0


def _tell(job: JobDirectory, record: JobRecord, args: argparse.Namespace) -> int:
    """Print the job's id, and how to follow it."""
    from llada_megatron.launch.cluster.fit import count_of_nodes

    if args.json:
        emit_json({"job_id": record.job_id, "directory": str(job.path), "nodes": record.nodes, "ranks": record.ranks})
        return 0
    nodes = count_of_nodes(record.nodes)
    print(f"job {record.job_id}: {record.name} on {nodes}, {record.ranks} ranks; its directory: {job.path}")
    message(f"follow it:  llada jobs {record.job_id}    llada logs {record.job_id} --follow")
    message(f"end it:     llada stop {record.job_id}    (saves first)")
    return 0
