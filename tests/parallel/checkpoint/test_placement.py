"""The closed forms of who holds what equal what the models that Megatron builds ask for, rank by rank."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.checkpoint.conversion.placement import rank_shards

MODELS = [
    ("tiny-dense", []),
    ("tiny-dense", ["tie_embeddings=true"]),
    ("tiny-moe", []),
    ("tiny-moe-softmax", []),
]


@pytest.fixture(scope="module")
def asked():
    """What each rank of a case asks for, from models built in one other process."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.parallel.checkpoint.sharded_builds"]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(model, overrides, layout):
            case = {"model": model, "overrides": overrides, "layout": dataclasses.asdict(layout)}
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@st.composite
def cases(draw):
    """A model and a layout of up to 16 ranks for it."""
    name, overrides = draw(st.sampled_from(MODELS))
    tensor, stages = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    context, data = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    hypothesis.assume(tensor * stages * context * data <= 16)
    moe, held = name != "tiny-dense", tensor * context * data
    expert_tensor = draw(st.sampled_from([n for n in (1, 2, 4) if held % n == 0])) if moe else 1
    expert = draw(st.sampled_from([n for n in (1, 2, 4, 8) if held % (n * expert_tensor) == 0])) if moe else 1
    layout = LayoutConfig(
        tensor_parallel=tensor,
        sequence_parallel=tensor > 1,
        pipeline_parallel=stages,
        pipeline_chunks_per_rank=draw(st.sampled_from([1, 2])) if stages == 2 else 1,
        context_parallel=context,
        data_parallel=data,
        expert_parallel=expert,
        expert_tensor_parallel=expert_tensor,
    )
    return name, overrides, layout


def placed(model, layout, key, shape, block):
    """(offsets, sizes): rank of all shards of a weight that is handed over in blocks of rows."""
    experts, rows = (shape[0], shape[1]) if len(shape) == 3 else (None, shape[0])
    found = {}
    for index in [(expert,) for expert in range(experts)] if experts else [()]:
        for start in range(0, rows, block):
            count = min(block, rows - start)
            part = torch.empty((count, *shape[len(index) + 1 :]), device="meta")
            for shard in rank_shards(model, layout, key, index, start, count):
                sizes = (*(1 for _ in index), *part[shard.slices].shape)
                found[shard.offsets, sizes] = shard.rank
    return found


def owners(shape, boxes):
    """The rank of every element; every element has one."""
    grid = torch.full(shape, -1)
    for (offsets, sizes), rank in boxes.items():
        area = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
        assert (grid[area] == -1).all()
        grid[area] = rank
    assert (grid >= 0).all()
    return grid


EXPERTS_BOTH_WAYS = LayoutConfig(
    tensor_parallel=2,
    sequence_parallel=True,
    pipeline_parallel=2,
    data_parallel=4,
    expert_parallel=2,
    expert_tensor_parallel=2,
)


@hypothesis.settings(max_examples=25)
@hypothesis.example(("tiny-moe", [], EXPERTS_BOTH_WAYS), 7)
@hypothesis.example(("tiny-dense", [], LayoutConfig(pipeline_parallel=2, pipeline_chunks_per_rank=2)), 50)
@hypothesis.example(("tiny-dense", [], LayoutConfig(pipeline_parallel=2, pipeline_layers=[3, 1])), 50)
@hypothesis.given(cases(), st.integers(1, 100))
def test_every_rank_finds_in_its_files_what_it_asks_for(asked, case, block):
    name, overrides, layout = case
    model = load_model(name, overrides)
    expected, shapes = {}, {}
    for rank, boxes in reversed(list(enumerate(asked(*case)))):
        for key, shape, offsets, sizes in boxes:
            shapes[key] = tuple(shape)
            expected.setdefault(key, {})[tuple(offsets), tuple(sizes)] = rank  # the first rank comes last
    for key, shape in shapes.items():
        whole = placed(model, layout, key, shape, max(shape))
        assert whole == expected[key], key
        blocks = placed(model, layout, key, shape, block) if ".3." in key or "layers" not in key else whole
        assert torch.equal(owners(shape, blocks), owners(shape, whole)), key


def test_a_layout_that_does_not_divide_the_model_is_refused():
    dense, moe = load_model("tiny-dense"), load_model("tiny-moe")
    with pytest.raises(ConfigError, match="3 tensor-parallel ranks do not divide output_layer.weight"):
        rank_shards(dense, LayoutConfig(tensor_parallel=3), "output_layer.weight", (), 0, 8)
    with pytest.raises(ConfigError, match="3 expert-parallel ranks do not divide"):
        layout = LayoutConfig(data_parallel=3, expert_parallel=3)
        rank_shards(moe, layout, "decoder.layers.1.mlp.experts.experts.linear_fc1.weight", (0,), 0, 8)
    with pytest.raises(ConfigError, match="3 pipeline stages do not divide the 4 layers"):
        rank_shards(dense, LayoutConfig(pipeline_parallel=3), "decoder.layers.3.input_layernorm.weight", (), 0, 8)
