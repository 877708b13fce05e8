"""`llada merge`: average the weights of several checkpoints, the best of a run by validation loss."""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_megatron.console import emit_json, message, size_text
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.convert import DTYPES, dtype_named, parse_layout

EXAMPLES = """\
examples:
  llada merge runs/mine --best 4 --output checkpoints/merged       the four with the lowest validation loss
  llada merge runs/a/checkpoints/step-00000800 runs/a/checkpoints/step-00001000 --output checkpoints/merged
  llada merge runs/a runs/b --best 3 --output checkpoints/merged --layout tensor_parallel=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints to average, and how to write the average."""
    parser.add_argument(
        "sources", nargs="+", metavar="CHECKPOINT", help="step-… directories, or runs: all of their checkpoints"
    )
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="directory to make: checkpoints/, tokenizer/, model.yaml"
    )
    parser.add_argument(
        "--best", type=int, metavar="K", help="average the K with the lowest validation loss (default: all)"
    )
    parser.add_argument("--layout", metavar="AXIS=N,…", help="cut it for these ranks (default: one shard)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    parser.add_argument("--workers", type=int, metavar="N", help="tensors at a time (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Average the checkpoints, and say which they were."""
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least 1")
    layout = parse_layout(args.layout)
    from llada_megatron.tools.convert.merger import MergeOptions, merge_checkpoints
    from llada_megatron.tools.convert.tasks import default_workers

    options = MergeOptions(
        best=args.best, layout=layout, dtype=dtype_named(args.dtype), workers=args.workers or default_workers()
    )
    summary = merge_checkpoints([Path(source) for source in args.sources], Path(args.output), options)
    for note in summary["notes"]:
        message(f"note: {note}")
    for each in summary["merged"]:
        loss = "" if each["validation_loss"] is None else f"  validation loss {each['validation_loss']:.4f}"
        print(f"{each['checkpoint']}{loss}")
    print(
        f"{summary['checkpoint']}: the average of {len(summary['merged'])} checkpoints, "
        f"{summary['tensors']:,} tensors, {summary['parameters']:,} parameters, {size_text(summary['bytes'])}"
    )
    if args.json:
        emit_json(summary)
    return 0
