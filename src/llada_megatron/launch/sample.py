"""`llada sample`: continue prompts, or fill the gaps in a text, with a trained checkpoint."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.launch.ranks.rank_info import find_rank_info
from llada_megatron.launch.sampling.options import (
    add_method,
    add_model,
    add_prompt_options,
    prompt_options_of,
    settings_of,
)
from llada_megatron.launch.sampling.prompt_sources import PromptSource, read_lines, read_texts
from llada_megatron.launch.sampling.terminal_output import ResultPrinter
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.sampling.results import Result

if TYPE_CHECKING:
    from llada_megatron.parallel.sampling.settings import Settings

EXAMPLES = """\
examples:
  llada sample runs/demo --prompt 'def main(' --max-new-tokens 48
  llada sample runs/demo --infill --prompt 'for i in <mask:2>(10):'      two tokens are missing
  llada sample runs/demo --edit 4:9 --file a.py                          characters 4 to 9 are replaced
  llada sample runs/demo --preset fast-dllm-dual schedule.threshold=0.8 --prompt 'import '
  git show HEAD:setup.py | llada sample runs/demo/checkpoints/step-00000400 --jsonl
  llada sample runs/large --prompts in.jsonl --output out.jsonl layout.data_parallel=4     a batch; see docs/sample.md

With --infill, <mask> stands for one token and <mask:N> for N of them (another word than mask: --gap-word). Without it
these are ordinary text. A method has three parts: the schedule chooses which masks a step fills, the cache which keys
and values are reused, and the editor which sampled tokens may still change. A preset is a published method
(--list-presets), and schedule.KEY=VALUE, cache.KEY=VALUE and editor.KEY=VALUE change its settings. One process runs the
model, whatever layout it was trained under, unless layout.AXIS=N asks for more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada sample`."""
    add_model(parser, optional=True)
    texts = parser.add_argument_group("what is written")
    texts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a text (may be repeated)")
    texts.add_argument("--file", action="append", default=[], metavar="FILE", help="a file with a text (repeatable)")
    texts.add_argument("--prompts", metavar="FILE", help='lines {"text": …} or {"tokens": [ids]}; - = standard input')
    add_prompt_options(texts)
    add_method(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--jsonl", action="store_true", help="one JSON object per text on stdout")
    output.add_argument(
        "--output", metavar="FILE", help="batch: results go to FILE; after an interruption the same command continues"
    )
    output.add_argument("--overwrite", action="store_true", help="begin the batch of --output anew")
    output.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")
    output.add_argument("--list-presets", action="store_true", help="show the published methods")


def run(args: argparse.Namespace) -> int:
    """Sample; raises ConfigError, DataError or CheckpointError."""
    if args.list_presets:
        return _list_presets(args)
    rank_info = None if args.local or args.output is not None else find_rank_info()
    if rank_info is not None and rank_info.world_size > 1:
        if rank_info.rank != 0:  # every rank finds the same error; rank 0 reports it
            return ConfigError.exit_code
        raise ConfigError(
            f"{rank_info.launcher} started {rank_info.world_size} processes: give --output FILE, or --local"
        )
    settings = settings_of(args)
    source = _source(args)
    if args.output is not None:
        if args.jsonl:
            raise ConfigError("--jsonl is for standard output; FILE of --output holds JSON lines anyway")
        from llada_megatron.launch.sampling.batch_command import run_batch

        return run_batch(settings, source, args)
    if args.overwrite:
        raise ConfigError("--overwrite belongs to --output FILE")
    return _print_all(settings, source, args)


def _print_all(settings: Settings, source: PromptSource, args: argparse.Namespace) -> int:
    """Sample all prompts and print the results in their order; returns the exit code."""
    began = time.perf_counter()
    for text in source.broken:
        message(f"passed over: {text}")
    printer = ResultPrinter(args.json, args.jsonl, [prompt.number for prompt in source.prompts])
    if settings.layout.world_size == 1:
        checkpoint, refused = _in_this_process(settings, source, printer)
    else:
        checkpoint, refused = _in_ranks(settings, source, printer)
    printer.finish()
    results, seconds = printer.results, time.perf_counter() - began
    tokens, forwards = sum(r.new_tokens for r in results), sum(r.forwards for r in results)
    message(f"{checkpoint}: {tokens} tokens in {forwards} forward passes, {seconds:.1f} s with loading")
    if args.json:
        summary = {"forwards": forwards, "seconds": seconds, "new_tokens": tokens, "checkpoint": checkpoint}
        emit_json({"samples": [result.record() for result in results], **summary})
    return 1 if refused or source.broken else 0


def _in_this_process(settings: Settings, source: PromptSource, printer: ResultPrinter) -> tuple[str, int]:
    """Sample in this process; returns the checkpoint and the number of prompts that could not be sampled."""
    from llada_megatron.parallel.sampling.sampler import open_sampler

    with open_sampler(settings) as sampler:
        session = sampler.session
        jobs, refused = session.accepted(source.prompts, source.tolerant)
        for text in refused:
            message(f"passed over: {text}")
        printer.expect([job.prompt.number for job in jobs])
        for event in session.run(jobs):
            for result in event.results:
                printer.take(result)
        if session.graphs_note:
            message(session.graphs_note)
        return str(session.loaded.path), len(refused)


def _in_ranks(settings: Settings, source: PromptSource, printer: ResultPrinter) -> tuple[str, int]:
    """Sample with one process per rank of the layout; returns the same as `_in_this_process`."""
    from llada_megatron.launch.sampling.batch_output import part_paths, records
    from llada_megatron.launch.sampling.prompt_batch import PromptBatch, write_in_ranks

    scratch = Path(tempfile.mkdtemp(prefix="llada-"))  # kept if a rank fails, with the logs of the ranks
    batch = PromptBatch(settings, source.prompts, scratch / "results", source.tolerant, progress=False)
    outcome = write_in_ranks(batch, scratch)
    found = [record for path in part_paths(batch.base) for record, _ in records(path)]
    shutil.rmtree(scratch)
    for record in found:
        printer.take(Result.of(record))
    return outcome.checkpoint, len(outcome.refused)


def _source(args: argparse.Namespace) -> PromptSource:
    """The prompts of the command line."""
    options = prompt_options_of(args)
    if args.prompts is None:
        return read_texts(args.prompt, args.file, options)
    if args.prompt or args.file:
        raise ConfigError("--prompts beside --prompt or --file: put all prompts into one file of lines")
    return read_lines(args.prompts, options)


def _list_presets(args: argparse.Namespace) -> int:
    from llada_megatron.llada_moe.sampling.presets import describe, table

    if args.json:
        emit_json(describe())
    else:
        sys.stdout.write(table() + "\n")
    return 0
