"""How much of the held-out text was seen in training, measured on the tokens that the model was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llada_megatron.llada_moe.data.packing import PackedDataset
from llada_megatron.llada_moe.data.shingles import TABLE_LIMIT, shingles

MOSTLY = 0.5
"""A document is a near-duplicate of the training text if more than this share of its shingles occurs there."""


def near_duplicate_share(training: Sequence[PackedDataset], held_out: Sequence[PackedDataset]) -> float:
    """The share of the held-out bytes in documents of which most shingles (ten tokens) occur in the training split.

    All documents of both splits are read. Of more than `TABLE_LIMIT` training tokens, a sample of the shingles by their
    value is compared; a held-out document without a shingle in the sample counts as none.
    """
    tokens, modulus = sum(dataset.tokens for dataset in training), 1
    while tokens > modulus * TABLE_LIMIT:
        modulus *= 2
    known = np.unique(
        np.concatenate([shingles(text, modulus) for dataset in training for text, _ in dataset.each_document()])
    )
    total = repeated = 0
    for dataset in held_out:
        for text, size in dataset.each_document():
            own = shingles(text, modulus)
            total += size
            found = known[np.searchsorted(known, own).clip(max=len(known) - 1)] == own
            repeated += size * bool(np.count_nonzero(found) > MOSTLY * len(own))
    return repeated / total
