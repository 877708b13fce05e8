"""Ranks are named by arithmetic as Megatron-Core numbers them."""

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel.coordinates import locate
from tests.ranks import run_ranks

LAYOUTS = [
    LayoutConfig(tensor_parallel=2, pipeline_parallel=2),
    LayoutConfig(context_parallel=2, data_parallel=2, expert_parallel=2),
    LayoutConfig(tensor_parallel=2, data_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
    LayoutConfig(pipeline_parallel=2, data_parallel=2, expert_parallel=2),
    LayoutConfig(tensor_parallel=2, data_parallel=2, expert_parallel=4),
]


def _from_megatron(layouts):
    from megatron.core import parallel_state

    from llada_megatron.parallel import topology

    places = []
    for layout in layouts:
        topology.initialize(layout, seed=0)
        places.append(topology.coordinates())
        parallel_state.destroy_model_parallel()
    return places


def test_arithmetic_agrees_with_megatrons_groups():
    per_rank = run_ranks(_from_megatron, 4, LAYOUTS)
    for rank, places in enumerate(per_rank):
        assert places == [locate(rank, layout) for layout in LAYOUTS]


def test_the_name_of_a_rank():
    layout = LayoutConfig(tensor_parallel=2, pipeline_parallel=2, data_parallel=2, expert_parallel=2)
    assert str(locate(7, layout)) == "rank 7 (dp 1, pp 1, tp 1, cp 0, ep 1)"


def test_a_rank_outside_the_layout():
    with pytest.raises(ValueError, match="rank 4 is not one of the layout's 4 ranks"):
        locate(4, LAYOUTS[0])
