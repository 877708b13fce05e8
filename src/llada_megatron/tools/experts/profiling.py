"""What `llada experts` does with a checkpoint: read its text, trace its routing, and tell it as a profile or report."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.routing_statistics import routing_changes
from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace
from llada_megatron.llada_moe.objectives import checkpoint_objective
from llada_megatron.tools.experts.expert_profile import expert_profile
from llada_megatron.tools.experts.model_identity import model_identity
from llada_megatron.tools.experts.opened_checkpoint import OpenOptions, with_checkpoint
from llada_megatron.tools.experts.profile_page import images
from llada_megatron.tools.experts.profile_texts import ProfileText, read_texts
from llada_megatron.tools.experts.token_classes import pieces_of

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.tools.experts.reports import Report


@dataclass(frozen=True)
class Traced:
    """A checkpoint's routing on a text."""

    trace: RoutingTrace
    text: ProfileText
    pieces: dict[int, str] | None
    """Text of each token; None where the checkpoint has no tokenizer."""
    model: ModelConfig
    step: int


def profile_of(
    args: argparse.Namespace, options: OpenOptions, ratios: list[float]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The profile that the command line asks for, and its heatmaps as PNG files by name.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be opened, compared or read.
    """
    found: Traced = with_checkpoint(args.checkpoint, options, traced, args, ratios)
    text, model = found.text, found.model
    profile, arrays = expert_profile(found.trace, found.pieces, args.capacity)
    facts = {
        "checkpoint": args.checkpoint,
        "step": found.step,
        "model": model_identity(model),
        "tokens": text.tokens,
        "sources": text.sources,
    }
    profile = facts | profile
    if args.compare:
        before = with_checkpoint(args.compare, options, compared, args, found.trace.ratios, text, model)
        changes = zip(found.trace.layers, routing_changes(before, found.trace), strict=True)
        layers = {str(layer): asdict(change) for layer, change in changes}
        profile["change"] = {"against": args.compare, "layers": layers}
    return profile, images(profile, arrays)


def traced(loaded: LoadedModel, args: argparse.Namespace, ratios: list[float]) -> Traced:
    """The routing of the model on the text of the command line (collective)."""
    model = loaded.run.model
    moe = model.moe
    assert moe is not None
    if args.capacity is not None and not moe.top_k <= args.capacity <= moe.num_experts:
        raise ConfigError(f"--capacity {args.capacity}: {moe.top_k} (top_k) to {moe.num_experts} (all experts)")
    tokenizer = _tokenizer(loaded, args.tokenizer)
    text = _text(args, loaded, tokenizer)
    trace = _trace(args, loaded, text, ratios)
    pieces = None if tokenizer is None else pieces_of(trace.tokens, tokenizer, model)
    return Traced(trace, text, pieces, model, int(loaded.metadata["step"]))


def compared(
    loaded: LoadedModel, args: argparse.Namespace, ratios: list[float], text: ProfileText, model: ModelConfig
) -> RoutingTrace:
    """The routing of the other checkpoint on the same text (collective). Raises ConfigError: it is another model, or it
    cannot read the text at `ratios`, as the first did."""
    if _shape(loaded.run.model) != _shape(model):
        raise ConfigError(
            f"--compare {args.compare}: another model than {args.checkpoint} (layers, leading dense layers, experts, "
            f"top_k, vocabulary and mask {_shape(loaded.run.model)} against {_shape(model)})"
        )
    if not checkpoint_objective(loaded.run, loaded.metadata).fills_masks and ratios != [0.0]:
        raise ConfigError(
            f"--compare {args.compare}: trained without masks, unlike {args.checkpoint}; both read the text unmasked "
            "with --ratios 0"
        )
    return _trace(args, loaded, text, ratios)


def reported(
    loaded: LoadedModel, args: argparse.Namespace, ratios: list[float], ranks: list[int], trial: int | None
) -> Report:
    """What is asked for in the place of a profile: agreement of passes, advice for `ranks`, or a trial (`reports`)."""
    from llada_megatron.tools.experts import reports

    if args.passes and checkpoint_objective(loaded.run, loaded.metadata).copies > 1:
        raise ConfigError(
            f"--passes: {args.checkpoint} was trained on a noisy and a clean copy of the text side by side (kind "
            f"{loaded.run.objective.kind}), and only passes over one copy can be compared"
        )
    text = _text(args, loaded, _tokenizer(loaded, args.tokenizer))
    ratios = _usable(loaded, ratios)
    if args.passes:
        return reports.passes(loaded, text.windows, ratios)
    if ranks:
        return reports.advice(loaded, text.windows, ratios, ranks)
    return reports.trial(loaded, text.windows, ratios, trial, args.output)


def _shape(model: ModelConfig) -> tuple[int, ...]:
    moe = model.moe
    assert moe is not None
    layers = (model.num_layers, moe.leading_dense_layers)
    return (*layers, moe.num_experts, moe.top_k, model.vocab_size, model.mask_token_id)


def _tokenizer(loaded: LoadedModel, path: str | None) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none and none is named."""
    from llada_megatron.parallel.sampling.checkpoint_tokenizer import checkpoint_tokenizer

    try:
        return checkpoint_tokenizer(loaded, path)
    except DataError as error:
        if path is not None:
            raise
        message(f"note: tokens are not told apart by their text: {error}")
        return None


def _text(args: argparse.Namespace, loaded: LoadedModel, tokenizer: Tokenizer | None) -> ProfileText:
    model = loaded.run.model
    longest = model.max_sequence_length
    length = min(512, longest) if args.length is None else args.length
    if length > longest:
        raise ConfigError(f"--length {length}: the model's max_sequence_length is {longest}")
    digest = (loaded.metadata.get("tokenizer") or {}).get("sha256") or (tokenizer and tokenizer.sha256)
    return read_texts(args.data, tokenizer, model, args.tokens, length, digest)


def _usable(loaded: LoadedModel, ratios: list[float]) -> list[float]:
    """The ratios, or 0 alone for a model that knows no masks."""
    if checkpoint_objective(loaded.run, loaded.metadata).fills_masks:
        return ratios
    message("note: the model was not trained with masks: its text is read unmasked")
    return [0.0]


def _trace(args: argparse.Namespace, loaded: LoadedModel, text: ProfileText, ratios: list[float]) -> RoutingTrace:
    from llada_megatron.parallel.evaluation.routing_profile import routing_trace

    ratios = _usable(loaded, ratios)
    message(f"{text.tokens:,} tokens of {len(text.sources)} sources at {len(ratios)} mask ratios")
    return routing_trace(loaded, text.windows, ratios, text.sources, args.block, args.seed)
