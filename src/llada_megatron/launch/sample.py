"""`llada sample`: continue prompts, or fill the gaps in a text, with a trained checkpoint."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.sampling import Report, Request, Sample, sample_all
from llada_megatron.llada_moe.config.schema import LayoutConfig
from llada_megatron.llada_moe.config.validation_layout import check_layout, data_parallel_for_experts
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, DataError

EXAMPLES = """\
examples:
  llada sample runs/demo --prompt 'def main(' --max-new-tokens 48
  llada sample runs/demo --infill --prompt 'for i in <mask:2>(10):'      two tokens are missing
  llada sample runs/demo --file a.py --file b.py --temperature 0.7 --seed 1
  git show HEAD:setup.py | llada sample runs/demo/checkpoints/step-00000400 --jsonl
  llada sample runs/large layout.tensor_parallel=4 layout.pipeline_parallel=2 --prompt 'Once'     8 processes

With --infill, <mask> stands for one token and <mask:N> for N of them (another word than mask: --gap-word). Without it
these are text like any other. Fewer --steps than tokens write several tokens in a step: faster, and less coherent.
One process runs the model, whatever layout it was trained under, unless layout.* asks for more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada sample`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output directory, or one of its checkpoints")
    parser.add_argument("layout", nargs="*", metavar="layout.axis=N", help="ranks to spread the model over")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a text (may be repeated)")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a file with a text (repeatable)")
    parser.add_argument("--infill", action="store_true", help="fill the gaps of each text instead of continuing it")
    parser.add_argument("--gap-word", default="mask", metavar="WORD", help="gaps are <WORD>, <WORD:N> (default: mask)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length of a continuation (64)")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes per text (default: one per token)")
    parser.add_argument("--block-length", type=int, metavar="N", help="write in blocks of N tokens, left to right")
    parser.add_argument(
        "--remasking", choices=["low_confidence", "random"], default="low_confidence", help="what stays"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest token (default)")
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0 = off)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts that run together")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint's tokenizer is now, if it was moved")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object per text on stdout")


def run(args: argparse.Namespace) -> int:
    """Sample; raises ConfigError, DataError or CheckpointError."""
    request = _request(args)
    show = _printer(args, len(request.texts))
    began = time.perf_counter()
    if request.layout.world_size == 1:
        samples, passes, checkpoint = _here(request, show)
    else:
        samples, passes, checkpoint = _in_ranks(request)
        for sample in samples:
            show(sample)
    seconds = time.perf_counter() - began
    tokens = sum(sample.new_tokens for sample in samples)
    message(f"{checkpoint}: {tokens} tokens in {passes} forward passes, {seconds:.1f} s with loading")
    if args.json:
        facts = {"forward_passes": passes, "seconds": seconds, "new_tokens": tokens, "checkpoint": checkpoint}
        emit_json({"samples": [asdict(sample) for sample in samples], **facts})
    return 0


def _here(request: Request, report: Report) -> tuple[list[Sample], int, str]:
    """Sample in this process."""
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.parallel.inference import open_checkpoint

    with open_checkpoint(request.checkpoint) as loaded:
        return *sample_all(loaded, request, report), str(loaded.path)


def _in_ranks(request: Request) -> tuple[list[Sample], int, str]:
    """Sample with one process per rank of the request's layout."""
    from llada_megatron.launch.local import python_program, run_local
    from llada_megatron.launch.sample_worker import write_request

    message(f"sampling with {request.layout.world_size} processes")
    with tempfile.TemporaryDirectory(prefix="llada-") as scratch:
        path = Path(scratch) / "request.json"
        write_request(request, path)
        program = python_program("llada_megatron.launch.sample_worker", str(path))
        facts = run_local(program, request.layout, Path(scratch)).facts
    return [Sample(**values) for values in facts["samples"]], facts["passes"], facts["checkpoint"]


def _request(args: argparse.Namespace) -> Request:
    """The command line, checked."""
    for name in ("max_new_tokens", "steps", "block_length", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature}: 0 or more")
    if not Path(args.checkpoint).is_dir():
        raise CheckpointError(f"there is no checkpoint at {args.checkpoint}")
    options = {each.name: getattr(args, each.name) for each in fields(Request) if each.name not in ("texts", "layout")}
    return Request(**options, texts=_texts(args), layout=_layout(args.layout, args.checkpoint))


def _layout(overrides: Sequence[str], checkpoint: str) -> LayoutConfig:
    """The layout to sample under; data-parallel ranks are added as its expert parallelism needs them.

    Raises:
        ConfigError: no such axis, an axis that sampling does not use, or one that does not fit the model.
    """
    axes: dict[str, Any] = {}
    for text in overrides:
        name, _, value = text.removeprefix("layout.").partition("=")
        usable = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel", "data_parallel")
        if not text.startswith("layout.") or name not in usable or not value.isdecimal():
            raise ConfigError(f"{text}: sampling takes {', '.join(f'layout.{axis}=N' for axis in usable)}")
        axes[name] = int(value)
    if not axes:
        return LayoutConfig()
    cut = [axes.get(name, 1) for name in ("tensor_parallel", "expert_parallel", "expert_tensor_parallel")]
    layout = LayoutConfig(**{"data_parallel": data_parallel_for_experts(*cut)} | axes)
    _check_layout(layout, checkpoint)
    return layout


def _check_layout(layout: LayoutConfig, checkpoint: str) -> None:
    """Refuse a layout that the checkpoint's model cannot be spread over."""
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of

    run = run_of(find_checkpoints(checkpoint)[0])
    training_layout = replace(layout, sequence_parallel=layout.tensor_parallel > 1)  # which training alone needs

    def refuse(key: str, reason: str) -> None:
        raise ConfigError(f"{key}: {reason}")

    check_layout(replace(run, layout=training_layout), refuse)


def _texts(args: argparse.Namespace) -> list[str]:
    """The texts of the command line; of stdin when it names none. Raises DataError for a file that is not text."""
    texts = list(args.prompt)
    for name in args.file:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 text ({error})") from error
    if texts:
        return texts
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("nothing to sample from: give --prompt TEXT, --file FILE, or a text on standard input")
    return [sys.stdin.read()]


def _printer(args: argparse.Namespace, count: int) -> Report:
    """What puts a result on stdout: JSON lines, or the text itself, under a line of its own where there are several."""
    numbers = iter(range(1, count + 1))

    def show(sample: Sample) -> None:
        number = next(numbers)
        if args.json:
            return
        if args.jsonl:
            emit_json({"number": number, **asdict(sample)})
        else:
            print(f"==> {number} <==\n{sample.text}" if count > 1 else sample.text, flush=True)

    return show
