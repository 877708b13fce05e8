"""Whatever a model says, step by step, every sequence ends, soon, and holds nothing it must not."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.editors import Editor, Levenshtein, TokenEditing, WideIn, Wino
from llada_megatron.llada_moe.sampling.loop import SequenceGroup
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Threshold
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation, infilling
from tests.llada_moe.sampling.editors.rows import DELETE, INSERT, MASK, method
from tests.llada_moe.sampling.toy import steps

EDITORS = [
    TokenEditing(0.0, 5),
    TokenEditing(0.5, 0, reach=2),
    Wino(0.9),
    Levenshtein(0.0, 6, DELETE, INSERT),
    Levenshtein(0.5, 0, DELETE, INSERT),
]


class RandomStatistics:
    """Statistics that follow no text: tokens, operations and probabilities at random."""

    def __init__(self, editor: Editor, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.words = torch.tensor([4, 5, 6, *editor.operations * 3])

    def __call__(self, work: Pass) -> Statistics:
        rows = len(work.offsets)
        chosen = self.words[torch.randint(len(self.words), (rows,), generator=self.draw)]
        sure, current = torch.rand(2, rows, generator=self.draw) + 1e-6
        text = torch.randint(4, 8, (rows,), generator=self.draw)
        return Statistics(chosen, sure, current=current, text=text)


def bound(request: Request, editor: Editor) -> int:
    """Steps that a sequence takes at most."""
    masks = [sum(request.gaps[start:end]) for start, end in request.blocks]
    budget = 0 if isinstance(editor, Wino) else editor.max_post_steps
    last = 1 if isinstance(editor, Levenshtein) else 0
    return sum(masks) + len(masks) * (budget + last)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=4),
    gaps=st.lists(st.booleans(), min_size=1, max_size=20).filter(any),
    grid=st.sampled_from([None, 3, 8]),
    schedule=st.sampled_from([FixedSteps(), FixedSteps(3), Threshold(0.6), WideIn(0.5)]),
    editor=st.sampled_from(EDITORS),
    seed=st.integers(0, 10**6),
)
def test_every_row_ends_within_the_bound(lengths, gaps, grid, schedule, editor, seed):
    requests = [continuation([9] * given, new, 6, i, grid) for i, (given, new) in enumerate(lengths)]
    requests.append(infilling([9] * len(gaps), gaps, 5, len(requests), grid))
    how = method(schedule, editor)
    size = max(len(request.tokens) for request in requests), max(len(request.blocks) for request in requests)
    group = SequenceGroup(how, 2, *size, MASK)
    finished = [done for step in steps(group, requests, RandomStatistics(editor, seed)) for done in step.finished]
    assert len(finished) == len(requests)
    for row in finished:
        request = requests[row.stream]
        assert row.passes <= bound(request, editor)
        for token, gap in zip(row.tokens, request.gaps, strict=False):
            assert token in (4, 5, 6, 7) if gap else token == 9
