"""The output layer and the loss, on the supervised rows only.

A diffusion step supervises the masked positions, about half of all: only their hidden states meet the vocabulary, and
their logits exist for one chunk of rows at a time, sharded over the tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llada_megatron.llada_moe.model.confidence import entropy_where_right
from llada_megatron.llada_moe.model.cross_entropy import cross_entropy
from llada_megatron.llada_moe.model.linear import plain, product
from llada_megatron.llada_moe.model.transfer import pinned, to_device


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


@dataclass(frozen=True)
class Targets:
    """What the output layer predicts in one micro-batch.

    Made on the host: how many rows there are decides the shapes of the tensors, and a device could say it only to a
    host that waits for it. `rows` are those of this rank, `all_rows` those of all slices of the sequence (see
    `SupervisedRows`).
    """

    index: torch.Tensor
    """`[rows]` int64: rows of this rank's flattened hidden states `[seq * batch]`."""
    labels: torch.Tensor
    """`[all_rows]` int64."""
    weights: torch.Tensor
    """`[all_rows]` float32; 0 for padding."""
    sequence: torch.Tensor
    """`[all_rows]` int64: the sequence of the micro-batch that a row belongs to, or its clean half, see `batch`."""
    batch: int
    """Sequences of the micro-batch; twice as many where the clean halves of sequences `[x_t ; x_0]` have sums of their
    own, which come after those of all noisy halves."""
    confidence: bool = False
    """Whether the entropies of correctly predicted rows are wanted too (see `confidence`)."""

    @classmethod
    def of(
        cls,
        labels: torch.Tensor,
        weights: torch.Tensor,
        tensor_rank: int = 0,
        tensor_shards: int = 1,
        clean: torch.Tensor | None = None,
    ) -> Targets:
        """The supervised rows of `labels` `[batch, seq]` with `weights` `[batch, seq]` float32 (0 = not supervised).

        Args:
            labels: on the host, as `weights`.
            tensor_rank: this rank's slice of the sequence.
            tensor_shards: slices of the sequence (1 without sequence parallelism).
            clean: bool `[seq]`, positions whose losses are summed apart; None = a sequence has one sum.
        """
        rows = select_rows((weights != 0).t(), tensor_rank, tensor_shards)
        batch = labels.size(0)
        sequence = rows.position % batch
        if clean is not None:
            sequence, batch = sequence + batch * clean[rows.position // batch], 2 * batch
        return cls(
            index=rows.index,
            labels=labels.t().flatten()[rows.position],
            weights=weights.t().flatten()[rows.position] * rows.real,
            sequence=sequence,
            batch=batch,
        )

    @property
    def shards(self) -> int:
        """Slices of the sequence whose rows the output layer returns together."""
        return self.labels.numel() // self.index.numel()

    def pinned(self) -> Targets:
        """The same in page-locked memory, where there is CUDA."""
        return self._each(pinned)

    def to(self, device: torch.device) -> Targets:
        """The same on the device; the host does not wait."""
        return self._each(lambda tensor: to_device(tensor, device))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        return replace(
            self,
            index=move(self.index),
            labels=move(self.labels),
            weights=move(self.weights),
            sequence=move(self.sequence),
        )


@dataclass(frozen=True)
class DraftRows:
    """Positions of one micro-batch whose most likely token is wanted; made on the host, as `Targets`."""

    index: torch.Tensor
    """`[rows]` int64: rows of this rank's flattened hidden states `[seq * batch]`."""
    real: torch.Tensor
    """`[positions]` int64: those among the rows of all slices of the sequence that are no padding."""
    position: torch.Tensor
    """`[positions]` int64: what they are of the flattened `[seq * batch]`."""
    never: torch.Tensor
    """`[ids]` int64: token ids that are never predicted."""
    shards: int
    """Slices of the sequence whose rows the output layer returns together."""

    @classmethod
    def of(
        cls, wanted: torch.Tensor, never: Collection[int], tensor_rank: int = 0, tensor_shards: int = 1
    ) -> DraftRows:
        """The rows of `wanted` `[batch, seq]` bool; `tensor_rank` and `tensor_shards` as of `Targets.of`."""
        rows = select_rows(wanted.t(), tensor_rank, tensor_shards)
        ids = torch.tensor(sorted(never), dtype=torch.int64)
        return cls(rows.index, rows.real.nonzero().flatten(), rows.position[rows.real], ids, tensor_shards)

    def pinned(self) -> DraftRows:
        """The same in page-locked memory, where there is CUDA."""
        return self._each(pinned)

    def to(self, device: torch.device) -> DraftRows:
        """The same on the device; the host does not wait."""
        return self._each(lambda tensor: to_device(tensor, device))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> DraftRows:
        names = ("index", "real", "position", "never")
        return replace(self, **{name: move(getattr(self, name)) for name in names})

    def written(self, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`inputs` `[batch, seq]` with `tokens` `[positions]` at these positions."""
        flat = inputs.t().flatten().index_copy(0, self.position, tokens)
        return flat.view(inputs.size(1), inputs.size(0)).t().contiguous()


def select_rows(selected: torch.Tensor, tensor_rank: int, tensor_shards: int) -> SupervisedRows:
    """Which rows run.

    Args:
        selected: bool `[seq, batch]`, equal on all tensor ranks; on the host.
        tensor_rank: this rank's slice of the sequence.
        tensor_shards: slices of the sequence (1 without sequence parallelism).
    """
    parts = [part.flatten().nonzero().flatten() for part in selected.chunk(tensor_shards)]
    longest = max(1, *(part.numel() for part in parts))
    padded = [torch.nn.functional.pad(part, (0, longest - part.numel())) for part in parts]
    real = [torch.arange(longest) < part.numel() for part in parts]
    per_part = selected.numel() // tensor_shards
    position = torch.cat([part + shard * per_part for shard, part in enumerate(padded)])
    return SupervisedRows(padded[tensor_rank], position, torch.cat(real))


def supervised_loss(model: Any, hidden: torch.Tensor, targets: Targets, chunk_elements: int) -> torch.Tensor:
    """Weighted cross-entropy of each sequence: sum_i weights_i * -log p(labels_i).

    Args:
        model: owner of `output_layer` (a ColumnParallelLinear) and of the tensor-parallel group.
        hidden: `[seq, batch, hidden]`, or this tensor rank's slice of the sequence under sequence parallelism.
        targets: on the device of `hidden`.
        chunk_elements: logits that may exist at a time on one rank.

    Returns:
        `[targets.batch]` float32; with `targets.confidence` `[2, batch]`, below it the sums of the entropies of those
        rows whose most likely token is the label.
    """
    step = max(1, chunk_elements // (model.output_layer.output_size_per_partition * targets.shards))
    if step >= targets.index.numel():
        losses = _chunk_loss(model, _flat(hidden), targets.index, targets.labels, targets.confidence)
    else:
        losses = _chunked_loss(model, _flat(hidden), targets, step)
    total = torch.zeros(targets.batch, device=losses.device)
    if not targets.confidence:
        return total.index_add(0, targets.sequence, losses * targets.weights)
    cost, entropy = losses
    return torch.stack(
        [
            total.index_add(0, targets.sequence, cost * targets.weights),
            total.index_add(0, targets.sequence, entropy * (targets.weights != 0)),
        ]
    )


@torch.no_grad()
def predicted_tokens(model: Any, hidden: torch.Tensor, rows: DraftRows, chunk_elements: int) -> torch.Tensor:
    """The most likely token at each wanted position, the lowest id of several, `[positions]` int64.

    Two numbers of a row leave a vocabulary shard, never its logits. Arguments as of `supervised_loss`.
    """
    step = max(1, chunk_elements // (model.output_layer.output_size_per_partition * rows.shards))
    flat = _flat(hidden)
    parts = [_most_likely(model, flat.index_select(0, index), rows.never) for index in rows.index.split(step)]
    whole = torch.cat([part.unflatten(0, (rows.shards, -1)) for part in parts], dim=1)
    return whole.flatten().index_select(0, rows.real)


def _most_likely(model: Any, rows: torch.Tensor, never: torch.Tensor) -> torch.Tensor:
    """Token ids `[rows]` int64 from hidden states."""
    group = model.pg_collection.tp
    logits = _logits(model, rows).float()
    first = group.rank() * logits.size(1)
    ids = torch.arange(first, first + logits.size(1), device=logits.device)
    best, choice = logits.masked_fill(torch.isin(ids, never), -torch.inf).max(dim=1)
    token = ids[choice]
    if group.size() == 1:
        return token
    highest = best.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    token = torch.where(best == highest, token, torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(token, torch.distributed.ReduceOp.MIN, group=group)
    return token.clamp(max=logits.size(1) * group.size() - 1)  # where no shard has a highest, because of NaN


def selected_logits(model: Any, hidden: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Logits of the selected rows, in order of (sequence, position).

    Args:
        selected: bool `[batch, seq]`, on the host; or int64 `[rows]` on the device, places in a pass `[1, total]`.

    Returns:
        `[rows, vocab / tensor_parallel]`.
    """
    if selected.dtype is not torch.bool:
        return _logits(model, _flat(hidden).index_select(0, selected))
    batch, seq = selected.shape
    if not model.config.sequence_parallel:
        index = selected.flatten().nonzero().flatten()
        return _logits(model, _rows(hidden, index % seq * batch + index // seq))
    group = model.pg_collection.tp
    rows = select_rows(selected.t(), group.rank(), group.size())
    logits = _logits(model, _rows(hidden, rows.index))
    order = (rows.position % batch * seq + rows.position // batch)[rows.real].argsort()
    return logits.index_select(0, to_device(rows.real.nonzero().flatten()[order], logits.device))


def _rows(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `[seq, batch, hidden]`, flattened, by their `index` on the host."""
    return _flat(hidden).index_select(0, to_device(index, hidden.device))


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1)


def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    if plain(model.output_layer):
        return product(rows, model.output_layer.weight if weight is None else weight)
    logits, _ = model.output_layer(rows.unsqueeze(1), weight=weight)
    return logits.squeeze(1)


def _chunk_loss(
    model: Any, hidden: torch.Tensor, index: torch.Tensor, label: torch.Tensor, confidence: bool
) -> torch.Tensor:
    """Cross-entropy of some rows `[rows]`, or `[2, rows]`, below it their entropies where they are predicted right."""
    logits = _logits(model, hidden.index_select(0, index))
    group = model.pg_collection.tp
    if not confidence:
        return cross_entropy(model.config, logits, label, group)
    # first, because the kernels of the cross-entropy may write into the logits
    entropy = entropy_where_right(logits, label, group)
    return torch.stack([cross_entropy(model.config, logits, label, group), entropy])


def _chunked_loss(model: Any, hidden: torch.Tensor, targets: Targets, step: int) -> torch.Tensor:
    """`_chunk_loss` over `step` rows of every shard at a time; the backward pass computes a chunk's logits again."""
    index, labels = targets.index, targets.labels.view(targets.shards, -1)
    losses = [
        checkpoint(
            _chunk_loss,
            model,
            hidden,
            index[i : i + step],
            labels[:, i : i + step].flatten(),
            targets.confidence,
            use_reentrant=False,
        )
        for i in range(0, index.numel(), step)
    ]
    whole = torch.cat([loss.unflatten(-1, (targets.shards, -1)) for loss in losses], dim=-1)
    return whole.flatten(-2)
