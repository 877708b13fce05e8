"""With the exact cache every logit is that of a run over the whole sequence, whatever an editor changed before."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_megatron.llada_moe.model.windows import Window
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Cache, Recompute
from llada_megatron.llada_moe.sampling.editors import Editor, Levenshtein, NoEditor, TokenEditing, WideIn, Wino
from llada_megatron.llada_moe.sampling.loop import Finished, SequenceGroup
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.schedules import Threshold
from llada_megatron.llada_moe.sampling.statistics import Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation, infilling
from tests.llada_moe.sampling.editors.rows import DELETE, INSERT, MASK, VOCAB, method
from tests.llada_moe.sampling.toy import steps

GRID, SIZE = 4, 6
EDITORS = [
    NoEditor(),
    TokenEditing(0.3, 4),
    TokenEditing(0.3, 4, reach=1),
    TokenEditing(0.2, 2, reach=2),
    Wino(0.6),
    Levenshtein(0.2, 4, DELETE, INSERT),
]


class BlockCausal:
    """Two layers over kept features, each position seeing its block and what is before: stale features show."""

    def __init__(self, slots: int, seq: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, SIZE, generator=draw, dtype=torch.float64)
        self.place = torch.randn(seq, SIZE, generator=draw, dtype=torch.float64)
        self.output = 3 * torch.randn(SIZE, VOCAB, generator=draw, dtype=torch.float64)
        self.kept = [torch.full((slots, seq, SIZE), torch.nan, dtype=torch.float64) for _ in range(2)]

    def __call__(self, tokens: Tensor, window: Window) -> Tensor:
        """Logits `[total, vocab]` of a window's positions and shadows; keeps the features of the positions."""
        position = window.positions
        seen = torch.arange(window.keys)
        visible = seen // GRID <= position[:, None] // GRID
        visible[window.width :] &= seen != position[window.width :, None]
        shadow = position[window.width :]
        among = torch.zeros(len(position), window.shadows, dtype=torch.bool)
        among[window.width :] = True
        visible = torch.cat([visible, among], 1)
        where = torch.cat([seen, shadow])
        weight = visible.double() / (1.0 + (position[:, None] - where).abs())
        features = self.embedding[tokens] + self.place[position]
        for kept in self.kept:
            kept[window.slot, window.first : window.first + window.width] = features[: window.width]
            keys = torch.cat([kept[window.slot, : window.keys], features[window.width :]])
            features = features.tanh() + weight @ keys / weight.sum(1, keepdim=True)
        return features @ self.output


class Compared:
    """Runs passes with kept features, and beside them whole sequences without."""

    def __init__(self, group: SequenceGroup, model: BlockCausal, fresh: BlockCausal) -> None:
        self.group, self.model, self.fresh = group, model, fresh
        self.reader = Reader(group.method.logits_processor, 0, lambda packet: packet[None])
        self.largest, self.positions = 0.0, 0

    def __call__(self, work: Pass) -> Statistics:
        rows, at = [], 0
        for window in work.windows:
            tokens, wanted = work.tokens[at : at + window.total], work.output_mask[at : at + window.total]
            logits = self.model(tokens, window)[wanted]
            whole = dataclasses.replace(window, first=0, width=window.keys)
            text = torch.cat([self.group.buffer.tokens[window.slot, : window.keys], tokens[window.width :]])
            expected = self.fresh(text, whole)[window.first :][wanted]
            self.largest = max(self.largest, float((logits - expected).abs().max()) if len(logits) else 0.0)
            self.positions += window.total
            rows.append(logits)
            at += window.total
        assert not torch.cat(rows).isnan().any()
        return self.reader.read(torch.cat(rows), work.rows)


def run(
    requests: list[Request], editor: Editor, cache: Cache, seed: int, slots: int, stop_id: int | None = 12
) -> tuple[list[Finished], Compared]:
    schedule = WideIn(0.3) if isinstance(editor, Wino) else Threshold(0.4)
    how = dataclasses.replace(method(schedule, editor, stop_id, GRID), cache=cache)
    size = max(len(request.tokens) for request in requests), max(len(request.blocks) for request in requests)
    group = SequenceGroup(how, slots, *size, MASK)
    compared = Compared(group, *(BlockCausal(slots, size[0], seed) for _ in range(2)))
    finished = [done for step in steps(group, requests, compared) for done in step.finished]
    return sorted(finished, key=lambda row: row.stream), compared


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 25), st.integers(1, 16)), min_size=1, max_size=4),
    gaps=st.lists(st.booleans(), min_size=1, max_size=24).filter(any),
    editor=st.sampled_from(EDITORS),
    prefill=st.sampled_from([1, 8, 8192]),
    slots=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_logits_and_results_are_those_of_recomputation(lengths, gaps, editor, prefill, slots, seed):
    requests = [continuation([9] * given, new, None, i, GRID) for i, (given, new) in enumerate(lengths)]
    requests.append(infilling([8] * len(gaps), gaps, None, len(requests), GRID))
    kept, compared = run(requests, editor, BlockCausalCache(prefill), seed, slots)
    assert compared.largest <= 1e-9
    plain, _ = run(requests, editor, Recompute(), seed, slots)
    assert [row.tokens for row in kept] == [row.tokens for row in plain]


def test_edits_of_earlier_blocks_happen_and_cost_runs():
    requests = [continuation([9] * 8, 24, None, i, GRID) for i in range(8)]
    positions = {}
    for reach in (0, 1, 2):
        finished, compared = run(requests, TokenEditing(0.2, 4, reach), BlockCausalCache(), 5, 8)
        assert compared.largest <= 1e-9
        positions[reach] = compared.positions / sum(row.passes for row in finished)
    assert positions[0] < positions[1] < positions[2]


def test_a_block_that_nothing_changes_in_its_last_step_is_not_run_again():
    """The step that confirms a block ran it with its final tokens, so the next one starts from kept features."""
    requests = [continuation([9] * 4, 16, None, 0, GRID)]
    finished, compared = run(requests, TokenEditing(1.0, 4), BlockCausalCache(), 3, 1)
    assert compared.positions == 4 + GRID * finished[0].passes


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 24)), min_size=1, max_size=4),
    editor=st.sampled_from([editor for editor in EDITORS if not editor.reach]),
    cache=st.sampled_from([BlockCausalCache(), Recompute()]),
    seed=st.integers(0, 1000),
)
def test_what_stands_before_an_end_is_what_would_stand_there_without_one(lengths, editor, cache, seed):
    requests = [continuation([9] * given, new, None, i, GRID) for i, (given, new) in enumerate(lengths)]
    whole, _ = run(requests, editor, cache, seed, 3, stop_id=None)
    stop = whole[0].tokens[len(whole[0].tokens) * 2 // 3]
    for before, row in zip(whole, run(requests, editor, cache, seed, 3, stop_id=stop)[0], strict=True):
        written = [i for i, is_given in enumerate(row.given) if not is_given]
        end = next((i for i in written if before.tokens[i] == stop), len(row.tokens))
        assert row.tokens[:end] == before.tokens[:end]
        assert set(row.tokens[end:]) <= {stop}
        assert row.passes <= before.passes
