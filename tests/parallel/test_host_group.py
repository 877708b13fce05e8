"""Numbers on the host are summed over a tree of small gloo groups: few connections, and equal bits on all ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel import device, host_group, topology
from tests.ranks import run_ranks

MOST_PEERS = 64


@pytest.mark.parametrize("count", [1, 2, 16, 17, 64, 500, 512, 4096])
def test_a_tree_joins_all_ranks_with_few_connections_each(count):
    groups = host_group.groups_of_tree(range(7, 7 + count))
    joined = {7} if count == 1 else set(itertools.chain(*groups))
    assert joined == set(range(7, 7 + count))
    assert sum(len(members) - 1 for members in groups) == count - 1  # a tree: each rank is handed to the root once
    assert all(2 <= len(members) <= host_group.BRANCH for members in groups)
    assert max((sum(len(each) - 1 for each in groups if rank in each) for rank in joined), default=0) <= 45


def test_512_ranks_have_few_gloo_peers_under_any_layout():
    """Rank 0 is in the most groups: those of the world's tree, and of the tree of its data-parallel ranks."""

    def peers(count: int) -> int:
        return sum(len(members) - 1 for members in host_group.groups_of_tree(range(count)) if members[0] == 0)

    assert peers(512) + max(peers(count) for count in range(1, 257)) == 61


def reduced_in_small_groups():
    """What a tree of three levels makes of numbers whose sum depends on the order, and of flags."""
    host_group.BRANCH = 2
    rank = dist.get_rank()
    numbers = torch.tensor([0.1 * 3**rank, float(rank)], dtype=torch.float64)
    flag = torch.tensor([int(rank == 3)])
    host_group.world().all_reduce(numbers)
    host_group.world().all_reduce(flag, dist.ReduceOp.MAX)
    return numbers.tolist(), flag.item()


def test_all_ranks_get_the_same_bits():
    found = run_ranks(reduced_in_small_groups, 5)
    assert all(each == found[0] for each in found)
    (total, ranks), flag = found[0]
    assert total == pytest.approx(0.1 * (1 + 3 + 9 + 27 + 81), rel=1e-12) and ranks == 10 and flag == 1


LAYOUTS = (
    LayoutConfig(data_parallel=4),
    LayoutConfig(tensor_parallel=2, data_parallel=2),
    LayoutConfig(pipeline_parallel=2, data_parallel=2),
    LayoutConfig(context_parallel=2, data_parallel=2),
)


def sums_over_data_ranks():
    from megatron.core import parallel_state

    found = []
    for layout in LAYOUTS:
        topology.initialize(layout, 0)
        expected = torch.tensor([2 ** dist.get_rank()])
        mine = expected.clone()
        dist.all_reduce(expected, group=parallel_state.get_data_parallel_group())
        host_group.data_parallel().all_reduce(mine)
        found.append((mine.item(), expected.item()))
        parallel_state.destroy_model_parallel()
    return found


def test_the_ranks_are_those_of_the_data_parallel_group():
    for rank in run_ranks(sums_over_data_ranks, 4):
        assert all(mine == expected for mine, expected in rank), rank


def gloo_peers(monkeypatch: pytest.MonkeyPatch, layout: LayoutConfig, rank: int) -> tuple[int, int]:
    """How many ranks gloo connects `rank` with where there are GPUs, and how many groups it is in."""
    made: list[tuple[int, str]] = []
    new_group = dist.new_group

    def counted(ranks=None, timeout=None, backend=None, **rest):
        if rank in ranks:
            made.append((len(ranks), backend or device.communication_backend()))
        return new_group(ranks, backend="fake")

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        monkeypatch.setattr(dist, "new_group", counted)
        monkeypatch.setattr(device, "cuda_available", lambda: True)
        monkeypatch.setattr(topology, "model_parallel_cuda_manual_seed", lambda seed: None)
        topology.initialize(layout, 0)
        host_group.world()
    finally:
        monkeypatch.undo()
        topology.leave()
    return sum(size - 1 for size, backend in made if "gloo" in backend), len(made)


@pytest.mark.parametrize("rank", [0, 16, 511])
@pytest.mark.parametrize("name", ["llada2-flash-pretrain", "llada-moe-7b-a1b-pretrain"])
def test_no_rank_has_many_gloo_peers(monkeypatch, name, rank):
    layout = load_run(name).layout
    peers, groups = gloo_peers(monkeypatch, layout, min(rank, layout.world_size - 1))
    assert 0 < peers <= MOST_PEERS and groups <= 25  # 24 of megatron-core 0.16, 25 of 0.19
