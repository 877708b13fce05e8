"""`llada sample --output FILE`: a batch that can be interrupted and continued, here or in a job of torchrun or srun."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.sampling.batch_output import BatchOutput, run_description
from llada_megatron.launch.sampling.options import inputs_of
from llada_megatron.launch.sampling.prompt_batch import BatchOutcome, PromptBatch, rank_work, write_here, write_in_ranks
from llada_megatron.launch.sampling.terminal_output import PromptCounts
from llada_megatron.llada_moe.errors import ConfigError, LladaError
from llada_megatron.llada_moe.overwriting import refuse_overwriting

if TYPE_CHECKING:
    from llada_megatron.launch.ranks.rank_info import RankInfo
    from llada_megatron.launch.sampling.prompt_sources import PromptSource
    from llada_megatron.parallel.sampling.settings import Settings


def run_batch(settings: Settings, source: PromptSource, args: argparse.Namespace) -> int:
    """Sample the prompts that are not finished yet, then merge all results into the output; returns the exit code.

    Raises:
        LladaError: the batch cannot begin, or the error of the rank that failed first.
    """
    from llada_megatron.launch.ranks.rank_info import find_rank_info

    rank_info = None if args.local else find_rank_info()
    if rank_info is not None:
        return _run_as_rank(settings, source, rank_info, args)
    output = _output(args)
    with output.locked():
        batch = _begin(output, settings, source, args.overwrite)
        outcome = None
        try:
            if batch.prompts:
                outcome = _write(batch)
        except KeyboardInterrupt as stopped:
            message(f"interrupted: {_progress(output, batch)}")
            return getattr(stopped, "exit_code", 130)
        except BaseException:
            if output.count():
                message(f"failed: {_progress(output, batch)}")
            raise
        return _end(output, batch, outcome, source, args.json)


def _output(args: argparse.Namespace) -> BatchOutput:
    """The files of the batch. Raises ConfigError: one of them is read by this command, or `--output` is no file."""
    output = BatchOutput(Path(args.output))
    refuse_overwriting("--output", output.files, inputs_of(args))
    return output


def _progress(output: BatchOutput, batch: PromptBatch) -> str:
    return (
        f"{output.count():,} of {batch.finished + len(batch.prompts):,} prompts are finished and on disk; "
        "the same command goes on with the others"
    )


def _write(batch: PromptBatch) -> BatchOutcome:
    """Run a batch in this process or with several ranks, whose logs are kept beside the output if one of them fails."""
    logs = _logs(batch.base)
    outcome = write_here(batch) if batch.settings.layout.world_size == 1 else write_in_ranks(batch, logs)
    shutil.rmtree(logs, ignore_errors=True)
    return outcome


def _logs(output: Path) -> Path:
    return output.with_name(output.name + ".logs")


def _begin(output: BatchOutput, settings: Settings, source: PromptSource, overwrite: bool) -> PromptBatch:
    """Check the earlier results, and return the batch of the prompts that are not finished."""
    from llada_megatron.parallel.checkpoint.search import find_checkpoints

    for text in source.broken:
        message(f"passed over: {text}")
    # The checkpoint is fixed here, in case a run that is still training saves a newer one meanwhile.
    settings = replace(settings, checkpoint=str(find_checkpoints(settings.checkpoint)[0]))
    description = run_description(settings, Path(settings.checkpoint).resolve())
    finished = output.begin(description, source.prompts, overwrite)
    left = [prompt for prompt in source.prompts if prompt.number not in finished]
    if finished:
        message(
            f"{len(finished):,} prompts are finished; {len(left):,} are left" if left else "all prompts are finished"
        )
    return PromptBatch(settings, left, output.path, source.tolerant, finished=len(finished))


def _end(
    output: BatchOutput, batch: PromptBatch, outcome: BatchOutcome | None, source: PromptSource, as_json: bool
) -> int:
    """Merge the parts into the output and report counts; returns the exit code."""
    counts, now = PromptCounts(), PromptCounts()
    written = {prompt.number for prompt in batch.prompts}
    for record in output.merge():
        counts.add(record)
        if record["number"] in written:
            now.add(record)
    refused = outcome.refused if outcome else []
    seconds = outcome.seconds if outcome else 0.0
    summary: dict[str, Any] = {
        "output": str(output.path),
        "checkpoint": outcome.checkpoint if outcome else None,
        "prompts": counts.prompts,
        "written_now": now.prompts,
        "passed_over": len(refused) + len(source.broken),
        "new_tokens": counts.new_tokens,
        "forwards": counts.forwards,
        "tokens_per_forward": round(counts.tokens_per_forward, 4),
        "positions_per_token": round(counts.positions_per_token, 2),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(now.new_tokens / seconds, 2) if now.prompts else None,
    }
    if as_json:
        emit_json(summary)
    else:
        for name, value in summary.items():
            if value is not None:
                print(
                    f"{name.replace('_', ' '):<20} {value:,}"
                    if isinstance(value, int)
                    else f"{name.replace('_', ' '):<20} {value}"
                )
    return 1 if summary["passed_over"] else 0


def _run_as_rank(settings: Settings, source: PromptSource, rank_info: RankInfo, args: argparse.Namespace) -> int:
    """Run this process as a rank of a job that torchrun or srun started; rank 0 begins and ends the batch."""
    from llada_megatron.launch.ranks.rank import run_joined_rank
    from llada_megatron.launch.ranks.rank_info import check_world

    try:
        check_world(rank_info, settings.layout)
        output = _output(args)
        if args.prompts in (None, "-") and not args.prompt and not args.file:
            raise ConfigError("the ranks of a job cannot share standard input: give --prompts FILE, --prompt or --file")
    except LladaError as error:
        if rank_info.rank != 0:  # every rank finds the same error; rank 0 reports it
            return error.exit_code
        raise
    os.environ.update(rank_info.environment())
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    begun: list[PromptBatch] = []
    with contextlib.ExitStack() as held:

        def begin() -> PromptBatch:
            from llada_megatron.parallel.collectives import on_rank_0

            def first() -> PromptBatch:
                held.enter_context(output.locked())
                return _begin(output, settings, source, args.overwrite)

            begun.append(on_rank_0(first))
            return begun[0]

        facts, _ = run_joined_rank(rank_work(settings, begin), settings.layout, _logs(output.path), rank_info.rank)
        if rank_info.rank != 0:
            return 0
        shutil.rmtree(_logs(output.path), ignore_errors=True)
        return _end(output, begun[0], BatchOutcome(**facts), source, args.json)
