"""The output layer and the loss, on the supervised rows only.

A diffusion step supervises the masked positions, about half of all: only their hidden states meet the vocabulary, and
their logits exist for one chunk of rows at a time, sharded over the tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.utils.checkpoint import checkpoint

from llada_megatron.llada_moe.model.linear import plain, product


@dataclass(frozen=True)
class SupervisedRows:
    """Rows of the flattened `[seq * batch]` that this rank feeds to the output layer, and what they stand for.

    `index` is local to this rank's hidden states; `position` and `real` cover the rows of all tensor ranks in the order
    in which the output layer returns them. Under sequence parallelism every rank pads to the largest count, so that the
    gather inside the output layer is even; padding repeats row 0 and is not `real`.
    """

    index: torch.Tensor
    position: torch.Tensor
    real: torch.Tensor


def select_rows(selected: torch.Tensor, tensor_rank: int, tensor_shards: int) -> SupervisedRows:
    """Which rows run.

    Args:
        selected: bool `[seq, batch]`, equal on all tensor ranks.
        tensor_rank: this rank's slice of the sequence.
        tensor_shards: slices of the sequence (1 without sequence parallelism).
    """
    parts = [part.flatten().nonzero().flatten() for part in selected.chunk(tensor_shards)]
    longest = max(1, *(part.numel() for part in parts))
    padded = [torch.nn.functional.pad(part, (0, longest - part.numel())) for part in parts]
    real = [torch.arange(longest, device=selected.device) < part.numel() for part in parts]
    per_part = selected.numel() // tensor_shards
    position = torch.cat([part + shard * per_part for shard, part in enumerate(padded)])
    return SupervisedRows(padded[tensor_rank], position, torch.cat(real))


def supervised_loss(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, chunk_elements: int
) -> torch.Tensor:
    """Weighted cross-entropy of each sequence: sum_i weights_i * -log p(labels_i).

    Args:
        model: owner of `output_layer` (a ColumnParallelLinear) and of the tensor-parallel group.
        hidden: `[seq, batch, hidden]`, or this tensor rank's slice of the sequence under sequence parallelism.
        labels: `[batch, seq]`.
        weights: `[batch, seq]` float32; 0 = not supervised.
        chunk_elements: logits that may exist at a time on one rank.

    Returns:
        `[batch]` float32.
    """
    rows = _rows(model, (weights != 0).t())
    label = labels.t().flatten()[rows.position]
    weight = weights.t().flatten()[rows.position] * rows.real
    sequence = rows.position % labels.size(0)
    shards = rows.position.numel() // rows.index.numel()
    step = max(1, chunk_elements // (model.output_layer.output_size_per_partition * shards))
    if step >= rows.index.numel():
        losses = _chunk_loss(model, _flat(hidden), rows.index, label)
    else:
        losses = _chunked_loss(model, _flat(hidden), rows.index, label, step, shards)
    return torch.zeros(labels.size(0), device=losses.device).index_add(0, sequence, losses * weight)


def selected_logits(model: Any, hidden: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Logits of the selected rows, in order of (sequence, position).

    Args:
        selected: bool `[batch, seq]`.

    Returns:
        `[rows, vocab / tensor_parallel]`.
    """
    if not model.config.sequence_parallel:
        return _logits(model, hidden.transpose(0, 1)[selected])
    rows = _rows(model, selected.t())
    logits = _logits(model, _flat(hidden).index_select(0, rows.index))
    position = rows.position[rows.real]
    order = (position % selected.size(0) * selected.size(1) + position // selected.size(0)).argsort()
    return logits[rows.real][order]


def _rows(model: Any, selected: torch.Tensor) -> SupervisedRows:
    group = model.pg_collection.tp
    shards = group.size() if model.config.sequence_parallel else 1
    return select_rows(selected, group.rank() if shards > 1 else 0, shards)


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)


def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    if plain(model.output_layer):
        return product(rows, model.output_layer.weight if weight is None else weight)
    logits, _ = model.output_layer(rows.unsqueeze(1), weight=weight)
    return logits.squeeze(1)


def _chunk_loss(model: Any, hidden: torch.Tensor, index: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    logits = _logits(model, hidden.index_select(0, index))
    return vocab_parallel_cross_entropy(logits.float().unsqueeze(1), label.unsqueeze(1)).squeeze(1)


def _chunked_loss(
    model: Any, hidden: torch.Tensor, index: torch.Tensor, label: torch.Tensor, step: int, shards: int
) -> torch.Tensor:
    """`_chunk_loss` over `step` rows of every shard at a time; the backward pass computes a chunk's logits again."""
    label = label.view(shards, -1)
    losses = [
        checkpoint(
            _chunk_loss, model, hidden, index[i : i + step], label[:, i : i + step].flatten(), use_reentrant=False
        ).view(shards, -1)
        for i in range(0, index.numel(), step)
    ]
    return torch.cat(losses, dim=1).flatten()
