"""`llada eval report`: one page for a run, or for several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ConfigError, DataError, LladaError
from llada_megatron.llada_moe.overwriting import refuse_overwriting

if TYPE_CHECKING:
    from llada_megatron.launch.evaluation.report.report_inputs import ReportedRun
    from llada_megatron.launch.evaluation.report.sample_section import AskedSamples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval report`."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folders of runs, and files of results: of llada eval …, llada sample, llada bench sample, llada experts",
    )
    parser.add_argument("--output", metavar="FILE.html", required=True, help="the page")
    parser.add_argument("--title", metavar="TEXT", help="of the page")
    samples = parser.add_argument_group("samples that are made for the report")
    samples.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="continued by each run's model (repeatable)"
    )
    samples.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length of a continuation (64)")
    samples.add_argument("--preset", metavar="NAME", help="a published method (llada sample --list-presets)")
    samples.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = the most probable token")
    samples.add_argument("--seed", type=int, default=0, help="seed of the random draws")


def run(args: argparse.Namespace) -> int:
    """Write the page; raises ConfigError, DataError or CheckpointError."""
    from llada_megatron.launch.evaluation.report.report_inputs import read_inputs
    from llada_megatron.launch.evaluation.report.report_page import report_page

    output = Path(args.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: give a file in a folder that there is")
    refuse_overwriting("--output", [output], args.paths)
    found = read_inputs(args.paths)
    if args.prompt and not found.runs:
        raise ConfigError("--prompt: no run's folder was given whose model could continue it")
    asked = [_samples(each, args) for each in found.runs] if args.prompt else []
    title = args.title or "Report: " + (", ".join(each.name for each in found.runs) or "results")
    try:
        output.write_text(report_page(title, found, asked), "utf-8", "replace")  # a path need not be text
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}") from error
    message(f"the report is in {output}")
    if args.json:
        runs = [{"name": each.name, "path": str(each.path)} for each in found.runs]
        files = [{"path": str(file.path), "kind": file.kind} for file in found.files]
        emit_json({"report": str(output), "runs": runs, "files": files})
    return 0


def _samples(each: ReportedRun, args: argparse.Namespace) -> AskedSamples:
    """What the newest checkpoint of a run writes; a run that cannot is no reason to leave out the others."""
    from llada_megatron.launch.evaluation.report.sample_section import AskedSamples
    from llada_megatron.parallel.sampling.sampler import open_sampler
    from llada_megatron.parallel.sampling.settings import Settings

    settings = Settings(
        checkpoint=str(each.path),
        preset=args.preset,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    try:
        with open_sampler(settings) as sampler:
            made = {
                "checkpoint": str(sampler.session.loaded.path),
                "method": str(sampler.session.choice),
                **{name: getattr(settings, name) for name in ("preset", "max_new_tokens", "temperature", "seed")},
            }
            records = [result.record() for result in sampler.generate(args.prompt)]
    except LladaError as error:
        return AskedSamples(each.name, [], {}, str(error))
    return AskedSamples(each.name, records, made)
