"""Whether the tokenizer beside imported weights names the same mask token as their configuration."""

from __future__ import annotations

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.huggingface.tokenizer_names import CONFIG as TOKENIZER_CONFIG
from llada_megatron.llada_moe.huggingface.tokenizer_names import parse
from llada_megatron.tools.convert.huggingface_source import CONFIG, HuggingFaceSource, KeptTokenizer


def mask_notes(source: HuggingFaceSource, tokenizer: KeptTokenizer, chosen: int | None) -> list[str]:
    """Notes on a mask token that is another one for the tokenizer than for the model; none if both agree.

    Args:
        chosen: the id of --mask-token-id.
    """
    known, mask = tokenizer.loaded, source.model.mask_token_id
    if known is None or known.mask_was_added or known.mask_id == mask:
        return []
    stated = source.config.get("mask_token_id") is not None
    origin = "--mask-token-id is" if chosen is not None else f"{CONFIG} says" if stated else "the published sampler has"
    name = next((f" {name!r}" for name, index in known.special_ids.items() if index == known.mask_id), "")
    fault = f"{origin} {mask}{_meaning(known, mask)}, and the tokenizer's mask token{name} has id {known.mask_id}"
    named = parse(source.directory / TOKENIZER_CONFIG, tokenizer.files.get(TOKENIZER_CONFIG, b"{}")).get("mask_token")
    by = f" (by {TOKENIZER_CONFIG})" if chosen is None and named else ""
    return [f"{fault}{by}: the model keeps {mask}; --mask-token-id {known.mask_id} would take the other one"]


def _meaning(tokenizer: Tokenizer, index: int) -> str:
    """What the tokenizer has under the id, in brackets."""
    name = next((name for name, other in tokenizer.special_ids.items() if other == index), None)
    if name is not None:
        return f" ({name!r} in the tokenizer)"
    return " (no token in the tokenizer)" if index >= tokenizer.vocab_size or index in tokenizer.unused_ids else ""
