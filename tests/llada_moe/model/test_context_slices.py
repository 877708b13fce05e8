"""What context ranks hold of a sequence: all of it once, in an order that is undone, and the same work each."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.model.attention.doubled_documents import pack_doubled
from llada_megatron.llada_moe.model.attention.packed_documents import pack
from llada_megatron.llada_moe.model.context_slices import (
    Run,
    busiest_over_mean,
    held_runs,
    in_order,
    slice_starts,
    taken,
)
from llada_megatron.llada_moe.model.patterns import (
    CAUSAL,
    FULL,
    AttentionPattern,
    Segment,
    begin_blocks,
    block_numbers,
)

LENGTH = 4096
DOUBLED = AttentionPattern(32, doubled=True)
PATTERNS = {
    "full": FULL,
    "causal": CAUSAL,
    "blocks": AttentionPattern(32),
    "[x_t ; x_0]": DOUBLED,
    "joint": AttentionPattern(32, doubled=True, causal_clean=True),
}
ONE = np.array([LENGTH])
DOCUMENTS = np.array([700, 1, 1300, 95, 2000])


@given(st.integers(1, 8), st.integers(1, 30), st.sampled_from(sorted(PATTERNS)))
def test_every_position_is_held_once_and_keys_come_back_in_order(ranks, each, name):
    pattern = PATTERNS[name]
    positions = ranks * each * pattern.copies
    sequence = torch.arange(positions * 3).view(positions, 3)
    parts = [taken(sequence, held_runs(positions, rank, ranks, pattern), dim=0) for rank in range(ranks)]
    assert {part.size(0) for part in parts} == {positions // ranks}
    assert torch.equal(in_order(torch.cat(parts), ranks, pattern), sequence)
    assert torch.equal(taken(sequence.t(), held_runs(positions, 0, ranks, pattern), dim=1), parts[0].t())


def test_a_rank_has_a_piece_from_the_beginning_and_one_from_the_end_where_later_queries_see_more():
    assert held_runs(32, 0, 2, DOUBLED) == (Run(0, 4), Run(12, 20), Run(28, 32))
    assert held_runs(32, 1, 2, DOUBLED) == (Run(4, 12), Run(20, 28))
    for pattern in (CAUSAL, AttentionPattern(8)):
        assert held_runs(32, 0, 2, pattern) == (Run(0, 8), Run(24, 32))
        assert held_runs(32, 1, 2, pattern) == (Run(8, 24),)
    assert held_runs(32, 1, 2, FULL) == (Run(16, 32),)


def work_of_ranks(lengths: np.ndarray, ranks: int, pattern: AttentionPattern) -> list[int]:
    """Pairs that each rank computes, as the attention's own packing of the documents counts them."""
    positions, work = LENGTH * pattern.copies, []
    edges = np.cumsum([0, *np.tile(lengths, pattern.copies)]).tolist()
    documents = [Segment(0, start, stop) for start, stop in pairwise(edges)]
    for rank in range(ranks):
        make = pack_doubled if pattern.doubled else pack
        packed = make(documents, pattern, positions, held_runs(positions, rank, ranks, pattern))
        work.append(sum(int((ends.astype(int) - begins).sum()) for begins, ends in packed.key_ranges()))
    return work


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(sorted(PATTERNS)),
    st.integers(1, 9),
    st.data(),
)
def test_blocks_are_whole_where_every_part_begins_one(ranks, shards, each, name, size, data):
    pattern = PATTERNS[name]
    length = ranks * shards * each * pattern.copies
    cuts = data.draw(st.sets(st.integers(1, 2 * length)) | st.just(set(range(0, 2 * length, size))))
    boundaries = torch.tensor(sorted(cuts | {0, length, 2 * length}), dtype=torch.int32)
    starts = torch.tensor(slice_starts(length, ranks, pattern, shards))
    found = begin_blocks(boundaries, size, starts + torch.arange(2)[:, None] * length)
    blocks, _ = block_numbers(boundaries, size, torch.arange(2 * length))
    owners: dict[int, set[int]] = {}
    for row, rank in product(range(2), range(ranks)):
        held = torch.cat([torch.arange(*run) for run in held_runs(length, rank, ranks, pattern)]) + row * length
        for shard, part in enumerate(held.chunk(shards)):
            for block in blocks[part].tolist():
                owners.setdefault(block, set()).add(rank * shards + shard)
    assert found == all(len(ranks_of) == 1 for ranks_of in owners.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_all_ranks_look_at_as_many_keys(ranks, name):
    pattern = PATTERNS[name]
    for lengths in (ONE, DOCUMENTS):
        work = work_of_ranks(lengths, ranks, pattern)
        assert sum(work) == sum(round(pattern.copies * n * pattern.keys_per_query(n)) for n in lengths.tolist())
        balance = busiest_over_mean(np.tile(lengths, pattern.copies), LENGTH * pattern.copies, ranks, pattern)
        assert balance == max(work) / (sum(work) / ranks)
        assert balance <= 1.05 or lengths is DOCUMENTS


def test_sequences_of_a_batch_are_added_up():
    """A rank that is busy with one sequence and idle with the next is as busy as the others."""
    lengths = np.array([LENGTH // 2, *[1] * (LENGTH // 2), *[1] * (LENGTH // 2), LENGTH // 2])
    assert busiest_over_mean(lengths, LENGTH, 2, FULL) == 1.0
    assert busiest_over_mean(lengths[: 1 + LENGTH // 2], LENGTH, 2, FULL) > 1.9
