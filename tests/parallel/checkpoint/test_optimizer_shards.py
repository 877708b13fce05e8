"""Optimizer state is written and read by each rank as it holds it, in boxes of the weights."""

from __future__ import annotations

import dataclasses
import functools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import distributed as dist

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig
from llada_megatron.parallel.training.optimizer_shards import STATES, boxes
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, parity_run
from tests.ranks import run_ranks


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    ends = draw(st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2))
    return shape, min(ends), max(ends)


@hypothesis.given(ranges())
def test_boxes_are_the_elements_of_a_range_in_their_order(drawn):
    shape, start, stop = drawn
    whole = torch.arange(math.prod(shape)).view(shape)
    found = [
        whole[tuple(slice(a, a + n) for a, n in zip(offset, sizes, strict=True))].flatten()
        for offset, sizes in boxes(shape, start, stop)
    ]
    joined = torch.cat(found) if found else whole.new_zeros(0)
    assert torch.equal(joined, torch.arange(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def moved_and_held(run):
    """(bytes that a rank received while its optimizer state was made ready to save, bytes of what it holds, keys)."""
    from llada_megatron.parallel import build, sharded_state, topology
    from llada_megatron.parallel.training import distributed_optimizer

    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    optimizer = distributed_optimizer.build_optimizer(run, build.wrap(run, chunks))
    received = []

    def counted(collective):
        def wrapped(*arguments, **given):
            tensors = [each for each in [*arguments, *given.values()] if torch.is_tensor(each)]
            received.append(sum(each.nbytes for each in tensors))
            return collective(*arguments, **given)

        return wrapped

    for name in ("gather", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast", "all_reduce"):
        setattr(dist, name, counted(getattr(dist, name)))
    model = sharded_state.model_state(chunks)
    saved = distributed_optimizer.optimizer_state(optimizer, model, loading=False)
    template = distributed_optimizer.optimizer_state(optimizer, model, loading=True)
    held = sum(each.data.nbytes for part in saved["shards"].values() for each in part.values())
    read = sum(each.data.nbytes for part in template["shards"].values() for each in part.values())
    return sum(received), held, read


def test_no_rank_gathers_or_reads_more_than_it_holds():
    """Megatron's own format gathered all of it on data rank 0, and read all of it on every rank."""
    for model, layout in (
        (DENSE, LayoutConfig(data_parallel=2)),
        (SIGMOID, LayoutConfig(data_parallel=2, expert_parallel=2)),
    ):
        found = run_ranks(moved_and_held, 2, parity_run(model, layout))
        (moved, held, read), (moved_too, held_too, _) = found
        assert moved == moved_too == 8  # the number of updates, on the host
        assert read == held
        whole = held + held_too
        assert 0.4 * whole < held < 0.6 * whole


def main_weights_in_small_buckets(run):
    """(number of buckets, this rank's boxes of the main weights and its weights, for `join_parts`)."""
    from llada_megatron.parallel import build, sharded_state, topology
    from llada_megatron.parallel.training import distributed_optimizer

    topology.initialize(run.layout, run.training.seed)
    build.DistributedDataParallelConfig = functools.partial(build.DistributedDataParallelConfig, bucket_size=5000)
    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    optimizer = distributed_optimizer.build_optimizer(run, models)
    for parameter in chunks[0].parameters():
        parameter.main_grad = parameter.data  # `gradient_parts` names and places what stands here
    weights = parity.gradient_parts(chunks)
    saved = distributed_optimizer.optimizer_state(optimizer, sharded_state.model_state(chunks), loading=False)
    shards = [shard for part in saved["shards"].values() for shard in part.values()]
    prefix = "optimizer.state.param."
    main = [
        (shard.key.removeprefix(prefix), shard.global_shape, shard.global_offset, shard.data.numpy().copy())
        for shard in shards
        if shard.key.startswith(prefix)
    ]
    assert {shard.key.split(".")[2] for shard in shards} == set(STATES)
    return sum(len(buffer.buckets) for model in models for buffer in model.buffers), main, weights


def test_boxes_are_those_of_the_weights_also_with_buckets_that_are_padded():
    """Of each bucket a rank holds an equal part, and buckets are filled up to whole parts."""
    run = parity_run(DENSE, LayoutConfig(data_parallel=2, overlap_grad_reduce=True))
    found = run_ranks(main_weights_in_small_buckets, 2, run)
    assert found[0][0] > 3
    main = parity.join_parts(part for _, parts, _ in found for part in parts)
    weights = parity.join_parts(found[0][2])
    assert main.keys() == weights.keys()
    assert all(torch.equal(main[name], weights[name]) for name in main)


def weights_read(run, root):
    """(elements of weights that a rank reads of a checkpoint, those that it holds, whether they come out the same)."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from llada_megatron.parallel import build, sharded_state, topology
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    store = CheckpointStore(root)
    store.save(1, sharded_state.model_state(chunks), {"step": 1})
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    for parameter in chunks[0].parameters():
        parameter.data.zero_()
    read = []
    read_data = FileSystemReader.read_data

    def counted(self, plan, planner):
        read.extend(math.prod(item.lengths) for item in plan.items)
        return read_data(self, plan, planner)

    FileSystemReader.read_data = counted
    state, _ = store.load(store.latest(), sharded_state.model_state(chunks))
    sharded_state.load_model_state(chunks, state)
    held = sum(parameter.numel() for parameter in before)
    same = all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
    return sum(read), held, same


def test_each_weight_is_read_by_one_of_the_ranks_that_hold_it(tmp_path):
    (read, held, same), (read_too, held_too, same_too) = run_ranks(
        weights_read, 2, parity_run(DENSE, LayoutConfig(data_parallel=2)), tmp_path
    )
    assert same and same_too and held == held_too
    assert read + read_too == held and min(read, read_too) > 0.3 * held


def resumed(run, root):
    """(updates in a checkpoint after two steps, whether its optimizer state is read back, keys that this rank held)."""
    from llada_megatron.parallel import build, sharded_state, topology
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    topology.initialize(run.layout, run.training.seed)
    store = CheckpointStore(root)

    def state_of(loading):
        model = sharded_state.model_state(chunks)
        return {**model, "optimizer": distributed_optimizer.optimizer_state(adam, model, loading)}

    def shards(state):
        parts = state["optimizer"]["shards"].values()
        return {(each.key, each.global_offset): each.data.clone() for part in parts for each in part.values()}

    for loading in (False, True):
        chunks = build.build_run_chunks(run)
        models = build.wrap(run, chunks)
        adam = distributed_optimizer.build_optimizer(run, models)
        step = TrainingStep(run, models, adam, parity.SyntheticData(run))
        if loading:
            loaded, _ = store.load(store.latest(), state_of(loading=True))
            sharded_state.load_model_state(chunks, loaded)
            distributed_optimizer.load_optimizer_state(adam, sharded_state.model_state(chunks), loaded["optimizer"])
            state = state_of(loading=False)
            after, updates = shards(state), state["optimizer"]["updates"]
            step(2)
        else:
            for number in range(2):
                step(number)
            state = state_of(loading=False)
            before = shards(state)
            store.save(2, state, {"step": 2})
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return updates, same, len(before)


@pytest.mark.parametrize(
    ("target", "layout", "lacking"),
    [
        ("experts.linear_fc1", LayoutConfig(data_parallel=2, expert_parallel=2), None),
        ("mlp.linear_fc1", LayoutConfig(pipeline_parallel=2), 1),
        ("experts.linear_fc1", LayoutConfig(pipeline_parallel=2), 0),
    ],
    ids=["no dense optimizer", "nothing on the last stage", "nothing on rank 0"],
)
def test_a_rank_or_an_optimizer_may_have_nothing_to_train(tmp_path, target, layout, lacking):
    small = dataclasses.replace(SIGMOID, num_layers=2)
    run = parity_run(small, layout, lora=LoRAConfig(rank=4, targets=[target]))
    for rank, (updates, same, held) in enumerate(run_ranks(resumed, 2, run, tmp_path)):
        assert updates == 2 and same
        assert (held == 0) == (rank == lacking)
