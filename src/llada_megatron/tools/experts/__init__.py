"""`llada experts`: where the tokens of a text go, in any checkpoint with experts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message, visible
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.convert import parse_layout

if TYPE_CHECKING:
    from llada_megatron.tools.experts.opened_checkpoint import OpenOptions

EXAMPLES = """\
examples:
  llada experts runs/demo --data data/demo                          a prepared set
  llada experts runs/demo --data book.txt --data code/              files and folders: each a source of its own
  llada experts runs/demo --data data/demo --output experts/        also page.html, PNG files and profile.json
  llada experts runs/demo --data data/demo --compare runs/earlier   what changed in the routing
  llada experts runs/demo --data data/demo --passes                 sampling against training passes
  llada experts runs/large --data data/demo --layout tensor_parallel=2,expert_parallel=4    over four GPUs
  llada experts runs/demo --data data/demo --advise 2,4             what imbalance costs, and what would help
  llada experts runs/demo --data data/demo --try placement=2 --output placed/   move the experts, and measure"""

_BAR = 24
_BLOCK = 32
"""Tokens of a block where --block does not say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llada experts`."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's directory, a step directory, an import, or a Hugging Face one"
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        action="append",
        required=True,
        help="prefix of a prepared set, or a text file, JSON lines or folder; can be given several times",
    )
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens of text (default %(default)s)")
    parser.add_argument(
        "--length", type=int, default=None, metavar="N", help="tokens of a window (default 512, or less)"
    )
    parser.add_argument(
        "--ratios", default="0.1,0.3,0.5,0.7,0.9", metavar="P,…", help="mask ratios, 0 to 1 (default %(default)s)"
    )
    parser.add_argument("--block", type=int, metavar="N", help=f"tokens of a block (default {_BLOCK})")
    parser.add_argument(
        "--capacity", type=int, metavar="N", help="experts open to a block (default: LLaDA2.2's share, 48 of 256)"
    )
    parser.add_argument(
        "--compare", metavar="CHECKPOINT", help="another checkpoint of the same model, on the same text"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write page.html, profile.json and PNG files; with --try the changed weights"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint's tokenizer is, if it has moved")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="compute in it (default: that of the run)")
    parser.add_argument(
        "--layout", metavar="AXIS=N,…", help="spread the model over processes or GPUs of this machine, one a rank"
    )
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="of a Hugging Face model that does not say")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--passes", action="store_true", help="instead: compare the routing of sampling and of training passes"
    )
    asked.add_argument(
        "--advise",
        metavar="RANKS,…",
        help="instead: what imbalance costs with so many expert-parallel ranks, and advice",
    )
    asked.add_argument(
        "--try",
        dest="tried",
        metavar="ADVICE",
        help="instead: apply `placement=RANKS` or `bias`, print expected beside measured; --output takes the weights",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the masks of a profile (default 0)")


def run(args: argparse.Namespace) -> int:
    """Profile the checkpoint; print a table, and write what is asked for."""
    ratios = parse_ratios(args.ratios)
    for name in ("tokens", "length", "block", "capacity"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ConfigError(f"--output {args.output}: not a directory")
    if args.seed is not None and args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: at least 0")
    other = args.passes or args.advise or args.tried
    if other:
        _refuse_options_of_profiles(args)
    args.block, args.seed = args.block or _BLOCK, args.seed or 0
    ranks = parse_ranks(args.advise) if args.advise else []
    if args.tried:
        parse_trial(args.tried)
    if args.tried and args.layout:
        raise ConfigError("--layout: --try changes the weights of a whole model, in one process")
    layout = parse_layout(args.layout)
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.tools.experts.opened_checkpoint import OpenOptions

    options = OpenOptions(layout, args.precision, args.mask_token_id)
    if other:
        return _other(args, options, ratios, ranks)
    from llada_megatron.tools.experts.profile_page import write_profile
    from llada_megatron.tools.experts.profiling import profile_of

    profile, drawn = profile_of(args, options, ratios)
    if args.output:
        message(f"page: {write_profile(Path(args.output), profile, drawn)}")
    print(table(profile))
    if args.json:
        emit_json(profile)
    return 0


def _refuse_options_of_profiles(args: argparse.Namespace) -> None:
    """Raises ConfigError: an option that --passes, --advise or --try would leave unread."""
    if args.compare:
        raise ConfigError(
            "--compare: two checkpoints are compared by their profiles, without --passes, --advise, --try"
        )
    for name in ("block", "capacity", "seed"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}: is for profiles, without --passes, --advise, --try")
    if args.output and not args.tried:
        raise ConfigError("--output: --passes and --advise write no files; --json prints their figures for programs")


def _other(args: argparse.Namespace, options: OpenOptions, ratios: list[float], ranks: list[int]) -> int:
    """What is done instead of a profile."""
    from llada_megatron.tools.experts.opened_checkpoint import with_checkpoint
    from llada_megatron.tools.experts.profiling import reported

    trial = parse_trial(args.tried) if args.tried else None
    lines, found = with_checkpoint(args.checkpoint, options, reported, args, ratios, ranks, trial)
    print("\n".join(lines))
    if args.json:
        emit_json(found)
    return 0


def parse_ratios(text: str) -> list[float]:
    """Mask ratios from `0.1,0.5`, ascending. Raises ConfigError."""
    try:
        ratios = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--ratios {text}: numbers with commas between, such as 0.1,0.5,0.9") from None
    if not all(0.0 <= ratio <= 1.0 for ratio in ratios):
        raise ConfigError(f"--ratios {text}: each between 0 and 1")
    return ratios


def parse_ranks(text: str) -> list[int]:
    """Numbers of expert-parallel ranks from `2,4,8`. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f"--advise {text}: numbers of ranks above 1 with commas between, such as 2,4,8")
    return sorted({int(part) for part in parts})


def parse_trial(text: str) -> int | None:
    """The ranks of `placement=RANKS`; None for `bias`. Raises ConfigError."""
    what, _, value = text.partition("=")
    if what == "placement" and value.isdecimal() and int(value) > 1:
        return int(value)
    if text != "bias":
        raise ConfigError(f"--try {text}: placement=RANKS (above 1), or bias")
    return None


def table(profile: dict[str, Any]) -> str:
    """The layers as lines with a bar each, and the reading."""
    from llada_megatron.tools.experts.profile_reading import reading

    lines = [f"{'layer':>5}  {'busiest / mean':<{_BAR + 6}}  entropy  dead  over  of a block"]
    for layer, facts in profile["layers"].items():
        bar = _bar(facts["max_over_mean"] / max(4.0, profile["experts"] / profile["top_k"]))
        lines.append(
            f"{layer:>5}  {facts['max_over_mean']:5.2f} {bar:<{_BAR}}  {facts['entropy']:7.3f}  {facts['dead']:4}  "
            f"{facts['overloaded']:4}  {facts['block']['mean']:6.1f}"
        )
    return "\n".join([*lines, "", *(f"- {visible(sentence)}" for sentence in reading(profile))])


def _bar(share: float) -> str:
    return "█" * round(min(share, 1.0) * _BAR) or "▏"
