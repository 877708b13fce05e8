"""`llada eval likelihood`: what texts cost a model, and which option of a question it finds most likely."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.evaluation.protocol_options import add_protocol, protocol_of
from llada_megatron.launch.evaluation.spread_job import SpreadJob, run_spread
from llada_megatron.launch.sampling.options import layout_of, require_checkpoint
from llada_megatron.llada_moe.config.fp8 import INFERENCE_RECIPES
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.overwriting import refuse_overwriting

if TYPE_CHECKING:
    from llada_megatron.llada_moe.evaluation.scored_lines import ScoredLine
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.evaluation.likelihood_file import LikelihoodFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval likelihood`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output directory, or one of its checkpoints")
    parser.add_argument("file", metavar="FILE", help="lines of JSON: questions with options, or texts")
    parser.add_argument("overrides", nargs="*", metavar="layout.AXIS=N", help="ranks that the model is spread over")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint's tokenizer is now, if it was moved")
    add_protocol(parser)
    how = parser.add_argument_group("further settings")
    how.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0 = off)")
    how.add_argument("--seed", type=int, default=0, help="seed of the masks")
    how.add_argument("--independent-masks", action="store_true", help="draw other masks for each option of a question")
    how.add_argument("--fp8", choices=INFERENCE_RECIPES, help="keep the layers' weights in FP8, on a GPU")
    how.add_argument("--limit", type=int, metavar="N", help="the first N lines only")
    how.add_argument("--positions", type=int, default=8192, metavar="N", help="positions of one forward pass (8192)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="a line of JSON for each line; the same command continues it")
    output.add_argument("--overwrite", action="store_true", help="begin the file of --output anew")
    output.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")


@dataclass(frozen=True)
class LikelihoodWork:
    """The work of each rank."""

    lines: Sequence[ScoredLine]
    protocol: LikelihoodProtocol
    tokenizer: str | None
    positions: int
    fp8: str | None
    output: str | None
    source: str
    """Digest of the input file."""
    overwrite: bool

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """Score what has no result yet, and summarise all."""
        import torch

        from llada_megatron.llada_moe.evaluation.likelihood_scores import summarised
        from llada_megatron.parallel.collectives import on_rank_0
        from llada_megatron.parallel.evaluation.likelihood_file import LikelihoodFile, score_lines
        from llada_megatron.parallel.evaluation.query_scorer import kind_of
        from llada_megatron.parallel.sampling.chat_template import PLAIN_TEXT_NOTE, has_template
        from llada_megatron.parallel.sampling.checkpoint_tokenizer import checkpoint_tokenizer

        kind = kind_of(loaded)
        protocol = self.protocol.of_model(kind.fills_masks, kind.verifies)
        textual = any(
            isinstance(content, str) and content for line in self.lines for content in (line.context, *line.answers)
        )
        tokenizer = checkpoint_tokenizer(loaded, self.tokenizer) if textual else None
        if tokenizer is not None and has_template(tokenizer) and torch.distributed.get_rank() == 0:
            message(PLAIN_TEXT_NOTE)
        facts = {
            **protocol.record(),
            "block": kind.block,
            "checkpoint": str(loaded.path.resolve()),
            "input": self.source,
            "precision": str(loaded.model.config.params_dtype).removeprefix("torch."),
            "fp8": self.fp8,
        }
        held: list[LikelihoodFile] = []  # on rank 0 only

        def opened() -> list[dict[str, Any]]:
            held.append(LikelihoodFile(Path(self.output or ""), facts, self.overwrite))
            return list(held[0].records)

        records = [] if self.output is None else on_rank_0(opened)
        known = {record["number"] for record in records}
        left = [line for line in self.lines if line.number not in known]
        for some in score_lines(loaded, tokenizer, left, protocol, self.positions):
            records += some
            if self.output is not None:
                on_rank_0(partial(_append, held, some))
        wanted = {line.number for line in self.lines}
        summary = summarised(record for record in records if record["number"] in wanted)
        return {"protocol": facts, "line": str(protocol), "summary": summary.record(), "scored_now": len(left)}


def _append(held: Sequence[LikelihoodFile], records: Sequence[dict[str, Any]]) -> None:
    held[0].append(records)


def run(args: argparse.Namespace) -> int:
    """Score the lines of a file; raises ConfigError, DataError or CheckpointError."""
    from llada_megatron.llada_moe.evaluation.scored_lines import parse_scored_lines

    require_checkpoint(args.checkpoint)
    for name in ("limit", "positions"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    if args.overwrite and args.output is None:
        raise ConfigError("--overwrite belongs to --output FILE")
    if args.output is not None:
        refuse_overwriting("--output", [Path(args.output)], [args.file, args.tokenizer])
    try:
        content = Path(args.file).read_bytes()
    except OSError as error:
        raise DataError(f"{args.file}: {error.strerror}") from error
    lines = parse_scored_lines(content.decode("utf-8-sig", "surrogateescape").split("\n"), args.file)
    work = LikelihoodWork(
        lines=lines[: args.limit],
        protocol=protocol_of(args, shared_masks=not args.independent_masks),
        tokenizer=args.tokenizer,
        positions=args.positions,
        fp8=args.fp8,
        output=args.output,
        source=hashlib.sha256(content).hexdigest()[:16],
        overwrite=args.overwrite,
    )
    layout = layout_of(args.overrides, args.checkpoint)
    result = run_spread(SpreadJob(args.checkpoint, layout, work, args.fp8), args.local)
    if result is None:
        return 0
    _show(result)
    if args.json:
        emit_json({"protocol": result["protocol"], **result["summary"]})
    return 0


def _show(result: dict[str, Any]) -> None:
    """The figures, under the protocol that they were measured by."""
    summary = result["summary"]
    if summary["questions"]:
        for name in ("acc", "acc_norm"):
            print(f"{name:<16} {_figure(summary[name])}   {summary['questions']} questions")
        print(f"{'undecided':<16} {summary['undecided']}   best two options within 2 standard errors")
    for name in ("nats_per_token", "bits_per_byte"):
        if summary[name] is not None:
            print(f"{name.replace('_', ' '):<16} {_figure(summary[name])}   {summary['texts']} texts")
    print(f"protocol: {result['line']}; {result['protocol']['precision']}; {result['protocol']['checkpoint']}")


def _figure(figure: dict[str, float | None]) -> str:
    error = figure["error"]
    return f"{figure['value']:.4f}" + (" (no standard error)" if error is None else f" ± {error:.4f}")
