"""The arguments that calls over packed documents have in common: flattened tensors and cumulative lengths (`thd`)."""

from __future__ import annotations

import torch

from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments, on_device


def packed_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and the keys and values that they see, of all documents one after another.

    Args:
        query: `[seq, batch, heads, head_dim]`, the positions of this rank.
        key: `[positions, batch, kv_heads, head_dim]`, the whole sequences; `value` the same.
        packed: who sees whom.

    Returns:
        `[batch * seq, heads, head_dim]` and twice `[keys, kv_heads, head_dim]`; views where one sequence is whole.
    """
    parts = packed.once(key_parts, query.device)
    return query.transpose(0, 1).flatten(0, 1), _seen(key, parts), _seen(value, parts)


def key_parts(packed: PackedDocuments, device: torch.device) -> list[tuple[int, slice]] | None:
    """Sequences and positions whose keys are taken one after another; None where that is every key once."""
    parts = [(number, row.keys) for number, runs in enumerate(packed.rows) for row in runs]
    whole = slice(0, packed.positions)
    return None if parts == [(number, whole) for number in range(len(packed.rows))] else parts


def _seen(tensor: torch.Tensor, parts: list[tuple[int, slice]] | None) -> torch.Tensor:
    if parts is None:
        return tensor.transpose(0, 1).flatten(0, 1)
    sequences = tensor.unbind(1)
    return torch.cat([sequences[number][keys] for number, keys in parts])


def cumulative_lengths(packed: PackedDocuments, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each document's queries and keys begin in what `packed_keys` returns: int32 `[documents + 1]` each."""
    return on_device(packed.cumulative_queries, device), on_device(packed.cumulative_keys, device)


def longest(packed: PackedDocuments, device: torch.device) -> tuple[int, int]:
    """Most queries and most keys of a document, rounded up to a power of two, but to no more than a sequence has.

    Kernels are chosen, and some are built, for each pair of these, so that there should be few of them.
    """
    queries = sum(row.queries for row in packed.rows[0])
    return (
        min(queries, _power_of_two(max(part.queries for part in packed.parts))),
        min(packed.positions, _power_of_two(max(part.keys for part in packed.parts))),
    )


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
