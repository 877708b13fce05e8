"""Self-speculation writes what decoding token by token writes, however good its drafts are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Recompute
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation
from llada_megatron.llada_moe.sampling.speculation import SpeculativeGroup, group_of
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import continuation, infilling
from tests.llada_moe.sampling import toy

MASK, EOS, VOCAB = 3, 2, 16


class Model:
    """Logits from the tokens whose keys are kept: causal rows depend on all before them and themselves, rows of drafts
    guess what decoding would write there, a share of the time."""

    def __init__(self, processor: LogitsProcessor, skill: float, seed: int) -> None:
        self.reader = Reader(processor, 0, lambda packet: packet[None])
        self.skill, self.seed = skill, seed
        self.memory: dict[int, list[int]] = {}

    def next_token(self, text: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, tuple(text))) % 2**62)
        return 4 * torch.randn(VOCAB, generator=generator)

    def __call__(self, work: Pass) -> Statistics:
        rows, at = [], 0
        for window in work.windows:
            memory = self.memory.setdefault(window.slot, [])
            assert window.first <= len(memory) and window.keys == window.first + window.width
            memory[window.first :] = work.tokens[at : at + window.width].tolist()
            text = window.keys - window.drafted
            for place in work.output_mask[at : at + window.width].nonzero().flatten().tolist():
                position = window.first + place
                known = memory[: min(position + 1, text)]
                logits = self.next_token(known)
                if position >= text:
                    assert memory[position] == MASK
                    while len(known) < position:  # guess token by token
                        known = [*known, int(self.reader_choice(logits))]
                        logits = self.next_token(known)
                    draw = torch.Generator().manual_seed(hash((position, self.seed)) % 2**62)
                    if torch.rand((), generator=draw) > self.skill:
                        logits = torch.randn(VOCAB, generator=draw)
                rows.append(logits)
            at += window.width
        logits = torch.stack(rows) if rows else torch.zeros(0, VOCAB)
        return self.reader.read(logits, work.rows)

    def reader_choice(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([MASK]), -torch.inf).argmax()


def method_of(stop: bool = True, temperature: float = 0.0, prefill: int = 8192, **keys: object) -> Method:
    processor = LogitsProcessor(excluded=[MASK], temperature=temperature)
    return Method(
        SelfSpeculation(**keys), BlockCausalCache(prefill), logits_processor=processor, stop_id=EOS if stop else None
    )


def written(method, requests, slots, skill, seed):
    model = Model(method.logits_processor, skill, seed)
    group = group_of(method, slots, 64, 4, MASK)
    assert isinstance(group, SpeculativeGroup)
    found = list(toy.steps(group, requests, model))
    finished = sorted((each for step in found for each in step.finished), key=lambda each: each.stream)
    assert group.free == list(range(slots)) and group.plan() is None
    return finished, found


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 9), st.integers(1, 3), st.booleans()),
    st.tuples(st.booleans(), st.sampled_from([0.0, 1.0]), st.sampled_from([2, 5, 8192])),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 10**6),
)
def test_tokens_are_those_of_decoding_token_by_token(sizes, draft, method, skill, seed):
    (length, passes, ahead), (stop, temperature, prefill) = draft, method
    draw = torch.Generator().manual_seed(seed)
    requests = [
        continuation(torch.randint(4, VOCAB, (given,), generator=draw).tolist(), new, None, stream)
        for stream, (given, new) in enumerate(sizes)
    ]
    fast = method_of(stop, temperature, prefill, draft_length=length, draft_passes=passes, ahead=ahead)
    slow = method_of(stop, temperature, draft_length=0)
    found, steps = written(fast, requests, 2, skill, seed)
    wanted, alone = written(slow, requests, 1, skill, seed)
    assert [(one.stream, one.tokens, one.given) for one in found] == [
        (one.stream, one.tokens, one.given) for one in wanted
    ]
    assert sum(step.changed.sum() for step in alone) == sum(len(step.changed) for step in alone)  # one token a pass
    for stream, request in enumerate(requests):
        tokens, start = dict[int, int](), request.gaps.index(True)
        for step in steps:
            for row, column in step.changed.nonzero().tolist():
                if step.block.stream[row] == stream:
                    position = int(step.block.first[row]) + column
                    assert tokens.setdefault(position, int(step.revision.tokens[row, column])) is not None
        assert list(tokens) == list(range(start, start + len(tokens)))  # from left to right, each once
        assert list(tokens.values()) == found[stream].tokens[start : start + len(tokens)]


def test_passes_of_perfect_and_of_useless_drafts():
    request = [continuation([5, 6, 7], 32, None)]
    counts = {}
    for skill in (0.0, 1.0):
        for ahead in (False, True):
            (one,), steps = written(method_of(False, draft_length=8, ahead=ahead), request, 1, skill, 1)
            assert one.passes == len(steps)
            counts[skill, ahead] = one.passes
    assert counts[1.0, False] == 8  # nine tokens in two passes: the first for certain, and one behind the draft
    assert counts[1.0, True] == 5  # then eight in each
    assert 16 <= counts[0.0, False] <= 32
    several = method_of(False, draft_length=8, draft_passes=3, ahead=False)
    assert written(several, request, 1, 1.0, 1)[0][0].passes > counts[1.0, False]


def test_a_whole_text_is_run_where_nothing_is_kept():
    request = [continuation([5, 6, 7], 20, None)]
    kept = method_of(False, draft_length=4)
    model = Model(kept.logits_processor, 0.7, 3)
    group = group_of(dataclasses.replace(kept, cache=Recompute()), 1, 64, 4, MASK)
    group.admit(0, request[0])
    tokens = []
    while (work := group.plan()) is not None:
        assert work.windows[0].first == 0
        tokens += [one.tokens for one in group.apply(model(work)).finished]
    assert tokens == [one.tokens for one in written(kept, request, 1, 0.7, 3)[0]]


@pytest.mark.parametrize(
    "request_", [continuation([], 4, None), infilling([5, 0, 6], [False, True, False], None)], ids=["empty", "gap"]
)
def test_what_does_not_begin_with_a_text_is_refused(request_):
    group = group_of(method_of(draft_length=4), 1, 64, 4, MASK)
    with pytest.raises(ValueError, match="continues a text of at least one token"):
        group.admit(0, request_)
    with pytest.raises(ValueError, match="no length yet"):
        group_of(method_of(), 1, 64, 4, MASK)
