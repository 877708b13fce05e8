"""Which positions each cache runs, pass by pass, and which keys they see."""

from __future__ import annotations

import pytest

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.caches import (
    BlockCausalCache,
    Cache,
    DualCache,
    NoCache,
    PrefixCache,
    Recompute,
    RefreshedCache,
    VicinityCache,
)
from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from tests.llada_moe.sampling.toy import MASK, steps

WHOLE = (0, 36, 36)


def ranges(cache: Cache, prompt: int = 20, new: int = 16, block: int = 8, grid: int | None = None) -> list[tuple]:
    """Of each pass of one sequence, one token per step: first position run, the one behind the last, keys seen."""
    taken = []

    def run(work: Pass) -> Statistics:
        [window] = work.windows
        taken.append((window.first, window.first + window.width, window.keys))
        positions = work.rows.position
        return Statistics(token=positions * 0 + 9, confidence=1.0 / (1 + positions.float()))

    request = continuation([5] * prompt, new, block, grid=grid)
    group = SequenceGroup(Method(cache=cache, grid=grid), 1, len(request.tokens), len(request.blocks), MASK)
    for _ in steps(group, [request], run):
        pass
    return taken


def test_without_a_cache_all_is_run_in_every_step():
    assert ranges(NoCache()) == [WHOLE] * 16
    causal = ranges(Recompute(), grid=8)  # 4 given tokens in the first of three blocks
    assert causal == [(0, 24, 24)] * 4 + [(0, 32, 32)] * 8 + [(0, 40, 40)] * 8


def test_prefix_runs_what_stands_before_the_block_at_its_first_step_only():
    assert ranges(PrefixCache()) == [WHOLE] + [(20, 36, 36)] * 7 + [WHOLE] + [(28, 36, 36)] * 7


def test_dual_runs_the_block_only():
    assert ranges(DualCache()) == [WHOLE] + [(20, 28, 36)] * 7 + [WHOLE] + [(28, 36, 36)] * 7


def test_vicinity_runs_neighbours_and_warms_up_once():
    first, second = (4, 36, 36), (12, 36, 36)
    assert ranges(VicinityCache()) == [WHOLE] * 5 + [first] * 3 + [WHOLE] + [second] * 7
    assert ranges(DualCache(3, 2, 0))[1:3] == [(17, 30, 36)] * 2
    assert ranges(DualCache(99, 99, 0)) == [WHOLE] * 16


def test_a_warm_up_longer_than_a_block_goes_on_in_the_next():
    assert ranges(DualCache(warm_up=10)) == [WHOLE] * 10 + [(28, 36, 36)] * 6


@pytest.mark.parametrize("kind", [PrefixCache, DualCache, RefreshedCache])
def test_refresh_counts_the_steps_of_a_block(kind):
    inside = ranges(kind())[1]
    expected = [WHOLE, inside, inside] * 3
    assert ranges(kind(refresh_every=3))[:8] == expected[:8]
    assert ranges(kind(refresh_every=3))[8] == WHOLE  # the next block


def test_block_causal_finishes_a_block_in_the_first_pass_of_the_next():
    """The prompt's whole blocks run with the first step; 4 given tokens stand in the first block that is written."""
    expected = [(0, 24, 24)] + [(16, 24, 24)] * 3 + [(16, 32, 32)] + [(24, 32, 32)] * 7
    assert ranges(BlockCausalCache(), grid=8) == [*expected, (24, 40, 40), *[(32, 40, 40)] * 7]


def test_block_causal_prefills_long_prompts_in_pieces():
    taken = ranges(BlockCausalCache(prefill=20), prompt=64, new=8, grid=8)
    assert taken[:4] == [(0, 16, 16), (16, 32, 32), (32, 48, 48), (48, 72, 72)]
    assert len(taken) == 3 + 8


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (DualCache, {"before": -1}),
        (VicinityCache, {"warm_up": -1}),
        (PrefixCache, {"refresh_every": 0}),
        (BlockCausalCache, {"prefill": 0}),
    ],
)
def test_refuses_settings_out_of_range(kind, values):
    with pytest.raises(ConfigError, match=f"cache.{next(iter(values))}: at least"):
        kind(**values)
