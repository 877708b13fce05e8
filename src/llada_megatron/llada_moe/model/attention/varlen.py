"""torch's own attention over packed documents (`torch.nn.attention.varlen`, from torch 2.10 on): one call for all."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments
from llada_megatron.llada_moe.model.attention.packed_keys import cumulative_lengths, longest, packed_keys


@cache
def operation() -> Callable[..., Any] | None:
    """torch's `varlen_attn`; None where this torch has none."""
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None


@cache
def _parameters(called: Callable[..., Any]) -> frozenset[str]:
    """Names, read once: every layer asks."""
    return frozenset(inspect.signature(called).parameters)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments, scale: float | None
) -> torch.Tensor:
    """Attend to all documents in one call; arguments and result as in `per_document.attend`."""
    given = arguments(query, key, value, packed, scale, operation())
    seq, batch = query.shape[:2]
    return operation()(**given).view(batch, seq, -1).transpose(0, 1).contiguous()


def arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedDocuments,
    scale: float | None,
    called: Callable[..., Any],
) -> dict[str, Any]:
    """What `called` (torch's function, whose arguments differ between releases) takes for these documents.

    A causal document is aligned at its last query and last key, as flash attention does it, so that a document whose
    queries are cut between context ranks is right as well.

    Raises:
        ValueError: this release takes no scale, and one is given.
    """
    taken = _parameters(called)
    query, key, value = packed_keys(query, key, value, packed)
    queries, keys = packed.once(cumulative_lengths, query.device)
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "cu_seq_q": queries, "cu_seq_k": keys}
    given["max_q"], given["max_k"] = packed.once(longest, query.device)
    if packed.pattern.block == 1:
        given |= {"window_size": (-1, 0)} if "window_size" in taken else {"is_causal": True}
    if "enable_gqa" in taken:
        given["enable_gqa"] = query.size(1) != key.size(1)
    if scale is not None:
        if "scale" not in taken:
            raise ValueError("torch.nn.attention.varlen of this torch takes no scale of the scores")
        given["scale"] = scale
    return given
