"""`llada train`: check a run, and start its ranks on this machine or be one that torchrun or srun started."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import LladaError

if TYPE_CHECKING:
    from llada_megatron.launch.ranks.local import LocalOutcome
    from llada_megatron.launch.ranks.rank_info import RankInfo
    from llada_megatron.llada_moe.config.run import RunConfig

EXAMPLES = """\
examples:
  llada train demo                                                  the run of configs/runs/demo.yaml
  llada train demo training.steps=50 layout.data_parallel=1 layout.expert_parallel=1
  torchrun --nproc-per-node 8 --no-python llada train run.yaml      join the processes of torchrun
  srun --ntasks 16 llada train run.yaml                             join the tasks of a SLURM step

A run whose output directory holds checkpoints continues from the newest one. The first Ctrl-C finishes the step and
saves, the second stops at once. Each rank's full output is in OUTPUT_DIR/logs/rank-N.log."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada train`."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, or a name in configs/runs")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values laid over the file's")
    parser.add_argument("--oversubscribe", action="store_true", help="allow many more ranks than cores")
    parser.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code (130 after Ctrl-C, 143 after SIGTERM)."""
    from llada_megatron.launch.ranks.rank_info import check_world, find_rank_info
    from llada_megatron.launch.resources import (
        check_callbacks,
        check_data,
        check_gpu_of_rank,
        check_inputs,
        check_space,
        check_weights,
    )
    from llada_megatron.launch.run_lock import check_free
    from llada_megatron.llada_moe.config import load_run

    info = None if args.local else find_rank_info()
    if info is None:
        config = load_run(args.config, args.overrides, message)
        check_inputs(args.config, config)
        return _train_here(config, args)
    try:
        config = load_run(args.config, args.overrides, message if info.rank == 0 else lambda text: None)
        check_inputs(args.config, config)
        check_world(info, config.layout)
        check_free(config.output_dir, os.environ.get("SLURM_JOB_ID"))
        check_callbacks(config)
        check_data(config)
        check_weights(config)
        check_space(config)
        _prepare_environment(info)
        check_gpu_of_rank(config, info.rank)
    except LladaError as error:
        if info.rank != 0:  # every rank finds the same error; rank 0 reports it
            return error.exit_code
        raise
    return _train_as_rank(config, info, args)


def start(run: RunConfig, oversubscribe: bool = False) -> LocalOutcome:
    """Check the machine and the data, then train `run` with one process per rank of its layout.

    Raises:
        LladaError: before any process starts, or the error of the rank that failed first.
        Stopped: a signal ended the run before a step could be finished.
    """
    from llada_megatron.launch.announcement import announcement
    from llada_megatron.launch.data_verification import verify_data
    from llada_megatron.launch.ranks.local import python_program, run_local
    from llada_megatron.launch.resources import (
        check_callbacks,
        check_data,
        check_machine,
        check_space,
        check_weights,
    )
    from llada_megatron.launch.run_lock import check_free
    from llada_megatron.llada_moe.config import dump_yaml

    check_free(run.output_dir, os.environ.get("SLURM_JOB_ID"))
    check_callbacks(run)
    check_data(run)
    check_weights(run)
    check_machine(run, oversubscribe)
    check_space(run)
    logs = Path(run.output_dir) / "logs"
    message(announcement(run))
    verify_data(run)
    with tempfile.TemporaryDirectory(prefix="llada-") as directory:
        resolved = Path(directory) / "run.yaml"
        resolved.write_text(dump_yaml(run), "utf-8")
        program = python_program("llada_megatron.launch.ranks.training_rank", str(resolved))
        return run_local(program, run.layout, logs, limits=run.recovery)


def _train_here(config: RunConfig, args: argparse.Namespace) -> int:
    from llada_megatron.launch.ranks.local import Stopped

    try:
        outcome = start(config, args.oversubscribe)
    except Stopped as stopped:
        message(f"stopped by {stopped} before a step was finished; {_how_to_resume(args)}")
        return stopped.exit_code
    return _finish(outcome.result, outcome.stopped_by, args)


def _train_as_rank(config: RunConfig, info: RankInfo, args: argparse.Namespace) -> int:
    from llada_megatron.launch.announcement import announcement
    from llada_megatron.launch.data_verification import verify_data
    from llada_megatron.launch.ranks.rank import run_joined_rank
    from llada_megatron.launch.ranks.training_rank import training_work

    logs = Path(config.output_dir) / "logs"
    if info.rank == 0:
        message(announcement(config, here=False))
    verify_data(config, info.rank, info.world_size)
    result, stopped = run_joined_rank(training_work(config), config.layout, logs, info.rank)
    if info.rank != 0:
        return 128 + signal.SIGINT if stopped else 0
    return _finish(result, signal.SIGINT if stopped else None, args)


def _prepare_environment(info: RankInfo) -> None:
    """What torch and CUDA read when they begin: it must stand before anything asks for the GPU."""
    os.environ.update(info.environment())
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _finish(result: dict[str, Any], stopped_by: int | None, args: argparse.Namespace) -> int:
    """Print the result, and how to go on where the run was stopped; returns the exit code."""
    if stopped_by is not None:
        message(f"stopped after step {result.get('steps')}; {_how_to_resume(args)}")
    if args.json:
        emit_json(result | {"stopped": stopped_by is not None})
    else:
        for name, value in result.items():
            if value is not None:
                print(f"{name.replace('_', ' '):<14} {value:g}" if isinstance(value, float) else f"{name:<14} {value}")
    return 0 if stopped_by is None else 128 + stopped_by


def _how_to_resume(args: argparse.Namespace) -> str:
    command = shlex.join(["llada", "train", args.config, *args.overrides])
    return f"continue from the newest checkpoint with: {command}"
