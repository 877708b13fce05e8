"""WINO against a plain loop over one sequence: what is revoked, and that it ends."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_megatron.llada_moe.sampling.editors import WideIn, Wino
from llada_megatron.llada_moe.sampling.loop import Finished, Method, SequenceGroup, Step
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.schedules import Schedule, SlowFast
from llada_megatron.llada_moe.sampling.statistics import Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation
from tests.llada_moe.sampling.editors.rows import MASK, method, probabilities, says
from tests.llada_moe.sampling.toy import Logits, bidirectional, steps


class ShadowModel:
    """Whole sequences; a shadow says what the model would of the sequence with its position masked."""

    def __init__(self, logits: Logits, method: Method) -> None:
        self.logits, self.reader = logits, Reader(method.logits_processor, 0, lambda packet: packet[None])

    def __call__(self, work: Pass) -> Statistics:
        rows, at = [], 0
        for window in work.windows:
            tokens = work.tokens[at : at + window.width]
            own = [self.logits(tokens)] + [self.logits(masked(tokens, i))[i : i + 1] for i in shadows_of(window)]
            rows.append(torch.cat(own)[work.output_mask[at : at + window.total]])
            at += window.total
        return self.reader.read(torch.cat(rows), work.rows)


def shadows_of(window) -> range:
    return range(window.shadow_first, window.shadow_first + window.shadows)


def masked(tokens: Tensor, at: int) -> Tensor:
    return tokens.index_fill(0, torch.tensor([at]), MASK)


def run(requests: list[Request], schedule: Schedule, editor: Wino, logits: Logits) -> tuple[list[Finished], list[Step]]:
    how = method(schedule, editor)
    size = max(len(request.tokens) for request in requests), max(len(request.blocks) for request in requests)
    taken = list(steps(SequenceGroup(how, len(requests), *size, MASK), requests, ShadowModel(logits, how)))
    finished = [done for step in taken for done in step.finished]
    return sorted(finished, key=lambda row: row.stream), taken


def plainly(request: Request, logits: Logits, wide: WideIn, narrow: float) -> tuple[list[int], int]:
    """The published loop: tokens, and forward passes."""
    tokens, passes = [MASK if gap else t for t, gap in zip(request.tokens, request.gaps, strict=True)], 0
    for start, end in request.blocks:
        masks, accepted_before = set(range(start, end)), 30
        while masks:
            passes += 1
            p, choice = probabilities(logits, tokens).max(-1)
            cap = min(max(int(len(masks) * wide.share), wide.least), wide.most)
            ranked = sorted(masks, key=lambda i: (-float(p[i]), i))
            taken = [i for i in ranked if p[i] > wide.threshold][:cap] or ranked[:1]
            doubts = []
            if len(taken) > 1:
                written = sorted(set(range(start, end)) - masks)
                shadow = {i: float(of_shadow(logits, tokens, i)) for i in written}
                doubts = sorted((i for i in written if shadow[i] < narrow), key=lambda i: (shadow[i], i))
                doubts = doubts[: accepted_before - 1]
            for i in taken:
                tokens[i] = int(choice[i])
            for i in doubts:
                tokens[i] = MASK
            masks = (masks - set(taken)) | set(doubts)
            accepted_before = len(taken)
    return tokens, passes


def of_shadow(logits: Logits, tokens: list[int], at: int) -> Tensor:
    return probabilities(logits, masked(torch.tensor(tokens), at).tolist())[at, tokens[at]]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    prompts=st.lists(st.lists(st.integers(4, 13), max_size=5), min_size=1, max_size=3),
    new=st.integers(1, 20),
    block=st.integers(1, 12),
    wide=st.sampled_from([WideIn(0.25), WideIn(0.4, 0.5, 2, 4), WideIn()]),
    narrow=st.sampled_from([0.3, 0.9]),
    seed=st.integers(0, 50),
)
def test_as_the_published_loop(prompts, new, block, wide, narrow, seed):
    requests = [continuation(prompt, new, block, i) for i, prompt in enumerate(prompts)]
    finished, _ = run(requests, wide, Wino(narrow), bidirectional(seed))
    for request, row in zip(requests, finished, strict=True):
        assert (row.tokens, row.passes) == plainly(request, bidirectional(seed), wide, narrow)
        assert row.passes <= new


def test_takes_back_what_later_tokens_make_improbable():
    def logits(tokens):
        text = [5, 6, 7, 8, 9, 10, 11, 12]
        if tokens[2] == MASK:
            text[1] = 13  # without its neighbour the model is sure, and wrong
        rows, masks = says(text, 9.0), int((tokens == MASK).sum())
        rows[{8: 2, 6: 5}.get(masks, 8) :] /= 9
        return rows

    finished, taken = run([continuation([], 8, None)], WideIn(), Wino(), logits)
    assert finished[0].tokens == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [step.changed[0].nonzero().flatten().tolist() for step in taken] == [[0, 1], [2, 3, 4], [1, 5, 6, 7], [1]]
    assert taken[2].revision.masked[0].nonzero().flatten().tolist() == [1]


def test_the_cap_lies_between_its_bounds():
    for masks, expected in ((4, 4), (6, 5), (20, 14), (40, 20)):
        _, taken = run([continuation([], masks, None)], WideIn(), Wino(0.0), lambda t: says([7] * len(t)))
        assert int(taken[0].changed.sum()) == expected


def test_what_the_model_did_not_look_at_is_not_taken_back():
    """SlowFast cuts the text behind its cycle off, where some of it is written already."""
    _, taken = run([continuation([5, 6], 24, None)], SlowFast(3, 0.15, 0.3), Wino(0.5), bidirectional(5, 1.0))
    at_risk = 0
    for step in taken:
        unseen = step.block.editable & (step.statistics.confidence == 0)
        at_risk += int(unseen.sum()) if int(step.changed.sum()) > 1 else 0
        assert not bool((step.revision.masked & unseen).any())
    assert at_risk
