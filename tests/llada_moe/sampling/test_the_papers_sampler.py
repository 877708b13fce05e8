"""Fixed steps beside the sampler of the LLaDA paper, written as a plain loop over whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from tests.llada_moe.sampling.toy import MASK, VOCAB, bidirectional, write


def of_the_paper(logits, prompt, new, block, steps, remasking, temperature, seed, stream, threshold=None):
    """Semi-autoregressive sampling by hand; a threshold is Fast-dLLM's change of it. Also the number of forwards."""
    x = torch.tensor([*prompt, *[MASK] * new])
    number = 0
    for begin in range(len(prompt), len(x), block):
        share = [block // steps + (i < block % steps) for i in range(steps)]
        for count in share:
            masks = [i for i in range(begin, begin + block) if x[i] == MASK]
            if not masks:
                break
            row = logits(x).clone()
            row[:, MASK] = -torch.inf
            confidence, position = row.softmax(-1), torch.arange(len(x))
            if temperature:
                ids = torch.arange(VOCAB)[None]
                places = position[:, None]
                noise = draws.gumbel(seed, draws.TOKEN, *(torch.tensor(n) for n in (stream, number)), places, ids)
                chosen = (row.float().double() + temperature * noise).argmax(-1)
            else:
                chosen = row.argmax(-1)
            sure = confidence[position, chosen]
            if remasking == "random":
                sure = draws.uniform(seed, draws.REMASKING, torch.tensor(stream), torch.tensor(number), position)
            masks.sort(key=lambda i: -float(sure[i]))
            if threshold is not None:
                count = max(1, sum(float(sure[i]) >= threshold for i in masks))
            for i in masks[:count]:
                x[i] = chosen[i]
            number += 1
    return x.tolist(), number


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    prompt=st.lists(st.integers(4, VOCAB - 1), max_size=6),
    blocks=st.integers(1, 3),
    block=st.integers(1, 6),
    steps=st.integers(1, 6),
    remasking=st.sampled_from(["low_confidence", "random"]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
)
def test_same_tokens_and_forwards(prompt, blocks, block, steps, remasking, temperature, seed):
    logits, steps = bidirectional(seed), min(steps, block)
    method = Method(
        FixedSteps(steps * blocks, remasking, seed),
        logits_processor=LogitsProcessor(excluded=[MASK], temperature=temperature, seed=seed),
    )
    [finished], _, _ = write([continuation(prompt, blocks * block, block, stream=seed)], method, logits)
    expected, number = of_the_paper(
        logits, prompt, blocks * block, block, steps, remasking, temperature, seed, stream=seed
    )
    assert finished.tokens == expected
    assert finished.passes == number == blocks * steps


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_is_its_change_by_fast_dllm(seed):
    logits = bidirectional(seed, 1.0)
    method = Method(Threshold(0.5), logits_processor=LogitsProcessor(excluded=[MASK]))
    [finished], _, _ = write([continuation([5, 6, 7], 24, 8)], method, logits)
    expected, number = of_the_paper(logits, [5, 6, 7], 24, 8, 8, "low_confidence", 0.0, 0, 0, threshold=0.5)
    assert finished.tokens == expected
    assert finished.passes == number
    assert number < 24 or seed == 5
