"""What context ranks hold of a sequence: all of it once, in an order that is undone, and the same work each."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.model.attention.doubled_documents import pack_doubled
from llada_megatron.llada_moe.model.context_slices import Run, held_runs, in_order, slice_starts, taken
from llada_megatron.llada_moe.model.patterns import AttentionPattern, Segment, begin_blocks, block_numbers

HALF = 4096


@given(st.integers(1, 8), st.integers(1, 30), st.booleans())
def test_every_position_is_held_once_and_keys_come_back_in_order(ranks, each, doubled):
    positions = ranks * each * (2 if doubled else 1)
    sequence = torch.arange(positions * 3).view(positions, 3)
    parts = [taken(sequence, held_runs(positions, rank, ranks, doubled), dim=0) for rank in range(ranks)]
    assert {part.size(0) for part in parts} == {positions // ranks}
    assert torch.equal(in_order(torch.cat(parts), ranks, doubled), sequence)
    assert torch.equal(taken(sequence.t(), held_runs(positions, 0, ranks, doubled), dim=1), parts[0].t())


def test_a_rank_has_a_piece_from_the_beginning_and_one_from_the_end_of_each_half():
    assert held_runs(32, 0, 2, doubled=True) == (Run(0, 4), Run(12, 20), Run(28, 32))
    assert held_runs(32, 1, 2, doubled=True) == (Run(4, 12), Run(20, 28))
    assert held_runs(32, 1, 2, doubled=False) == (Run(16, 32),)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(1, 9), st.data())
def test_blocks_are_whole_where_every_part_begins_one(ranks, shards, each, doubled, size, data):
    length = ranks * shards * each * (2 if doubled else 1)
    cuts = data.draw(st.sets(st.integers(1, 2 * length)) | st.just(set(range(0, 2 * length, size))))
    boundaries = torch.tensor(sorted(cuts | {0, length, 2 * length}), dtype=torch.int32)
    starts = torch.tensor(slice_starts(length, ranks, doubled, shards))
    found = begin_blocks(boundaries, size, starts + torch.arange(2)[:, None] * length)
    blocks, _ = block_numbers(boundaries, size, torch.arange(2 * length))
    owners: dict[int, set[int]] = {}
    for row, rank in itertools.product(range(2), range(ranks)):
        held = torch.cat([torch.arange(*run) for run in held_runs(length, rank, ranks, doubled)]) + row * length
        for shard, part in enumerate(held.chunk(shards)):
            for block in blocks[part].tolist():
                owners.setdefault(block, set()).add(rank * shards + shard)
    assert found == all(len(ranks_of) == 1 for ranks_of in owners.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_ranks_look_at_as_many_keys(ranks):
    whole = [Segment(0, 0, HALF), Segment(0, HALF, 2 * HALF)]
    pattern, work = AttentionPattern(32, doubled=True), []
    for rank in range(ranks):
        packed = pack_doubled(whole, pattern, 2 * HALF, held_runs(2 * HALF, rank, ranks, doubled=True))
        work.append(sum(int((ends.astype(int) - begins).sum()) for begins, ends in packed.key_ranges()))
    assert sum(work) == round(2 * HALF * pattern.keys_per_query(HALF))
    assert max(work) / (sum(work) / ranks) <= 1.05
