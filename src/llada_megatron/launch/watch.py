"""`llada watch`: shows how a text is unmasked, in the terminal or as a page with a slider over the steps."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.sampling.options import (
    add_method,
    add_model,
    add_prompt_options,
    inputs_of,
    prompt_options_of,
    settings_of,
)
from llada_megatron.launch.sampling.prompt_sources import read_texts
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.overwriting import refuse_overwriting

if TYPE_CHECKING:
    from llada_megatron.parallel.sampling.prompts import Prompt
    from llada_megatron.parallel.sampling.results import Result
    from llada_megatron.parallel.sampling.sampler import SampledStep, Sampler

EXAMPLES = """\
examples:
  llada watch runs/demo --prompt 'def main('
  llada watch runs/demo --infill --prompt 'for i in <mask:2>(10):' --pause 0.2
  llada watch runs/demo --preset fast-dllm --prompt 'import ' --html steps.html

Colours are probabilities, from red (low) to green (high); tokens of the latest step are underlined. If standard output
is not a terminal, the finished text goes there and a line per step to standard error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada watch`."""
    add_model(parser)
    texts = parser.add_argument_group("what is written")
    texts.add_argument("--prompt", metavar="TEXT", help="a text (default: standard input)")
    texts.add_argument("--file", metavar="FILE", help="a file with a text")
    add_prompt_options(texts)
    add_method(parser, batched=False)
    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", help="a page with all steps, for any browser, without a network")
    output.add_argument("--pause", type=float, default=0.0, metavar="S", help="seconds to wait after each step")


def run(args: argparse.Namespace) -> int:
    """Sample one text and show its steps; raises ConfigError, DataError or CheckpointError."""
    from llada_megatron.parallel.sampling.sampler import open_sampler

    if not 0 <= args.pause < threading.TIMEOUT_MAX:
        raise ConfigError(f"--pause {args.pause}: 0 or more")
    settings = settings_of(args)
    if settings.layout.world_size > 1:
        raise ConfigError("llada watch runs in one process; leave layout.… out")
    prompt = _prompt(args)
    if args.html is not None and (Path(args.html).is_dir() or not Path(args.html).absolute().parent.is_dir()):
        raise ConfigError(f"--html {args.html}: give a file in a folder that there is")
    if args.html is not None:
        refuse_overwriting("--html", [args.html], inputs_of(args))
    with open_sampler(settings) as sampler:
        steps, result = _watch(sampler, prompt, args)
        checkpoint = str(sampler.session.loaded.path)
    message(f"{checkpoint}: {result.new_tokens} tokens in {result.forwards} forward passes, {result.seconds:.1f} s")
    if args.json:
        written = [[asdict(one) for one in step.written] for step in steps]
        emit_json({"checkpoint": checkpoint, "steps": written, "result": result.record()})
    return 0


def _watch(sampler: Sampler, prompt: Prompt, args: argparse.Namespace) -> tuple[list[SampledStep], Result]:
    """Sample the prompt, show every step, and write the page if one is wanted."""
    from rich.console import Console

    from llada_megatron.launch.sampling.display import Recording, Screen, coloured, legend
    from llada_megatron.parallel.sampling.sequence_view import SequenceView

    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and not args.json
    jobs = sampler.jobs([prompt])
    view = SequenceView.of(jobs[0].request, sampler.tokenizer)
    recording = Recording(view)
    screen = Screen(console) if live else None
    if screen is not None:
        screen.__enter__()
    steps = []
    try:
        for step in sampler.steps_of(jobs):
            steps.append(step)
            recording.add(view.apply(step))
            status = _status(step, view)
            if screen is None:
                message(status)
            else:
                screen.show(view, step.number, status)
            time.sleep(args.pause)
    finally:
        if screen is not None:
            screen.__exit__()
    result = steps[-1].finished[0]
    if live:
        console.print(coloured(view.cells), legend(), sep="\n\n")
    elif not args.json:
        sys.stdout.write((_ids(result) if result.text is None else result.text) + "\n")
    if args.html is not None:
        Path(args.html).write_text(recording.html(_properties(sampler, result)), "utf-8")
        message(f"the steps are in {args.html}")
    return steps, result


def _status(step: SampledStep, view: Any) -> str:
    """One line on a step: how many tokens it sampled and masked again, and how many masks are left."""
    sure = [one.confidence for one in step.written if one.token is not None]
    mean = f", mean probability {sum(sure) / len(sure):.2f}" if sure else ""
    again = sum(one.token is None for one in step.written)
    masked = f", {again} masked again" if again else ""
    return f"step {step.number}: {len(sure)} written{masked}{mean}; {view.masked} to go"


def _properties(sampler: Sampler, result: Result) -> dict[str, str]:
    """What the page says of the sample, as name -> value."""
    choice, settings = sampler.session.choice, sampler.session.settings
    return {
        "checkpoint": str(sampler.session.loaded.path),
        "method": (f"{settings.preset}: " if settings.preset else "") + str(choice),
        "temperature": f"{settings.temperature:g}",
        "tokens per forward pass": f"{result.tokens_per_forward:.2f}",
    }


def _ids(result: Result) -> str:
    return " ".join(map(str, result.tokens))


def _prompt(args: argparse.Namespace) -> Prompt:
    """The one text of the command line."""
    if args.prompt is not None and args.file is not None:
        raise ConfigError("--prompt and --file: one text is watched at a time")
    texts = [] if args.prompt is None else [args.prompt]
    return read_texts(texts, [] if args.file is None else [args.file], prompt_options_of(args)).prompts[0]
