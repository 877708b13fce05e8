"""Small random models that write requests under any layout: what the tests of this folder run on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.model.patterns import CAUSAL
from llada_megatron.llada_moe.sampling.loop import Finished, Method
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation, infilling
from llada_megatron.parallel.sampling.stage import GenerationReport
from llada_megatron.tools.bench.layouts import BLOCKS, DENSE, SOFTMAX, parity_run
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

GRID = 8
"""Block size of the block-causal models."""
MASK, EOS = DENSE.mask_token_id, DENSE.eos_token_id
_SIZES = {"num_layers": 2, "init_std": 0.3, "max_sequence_length": 128}
_SHARPNESS = 1.5
"""By how much the output layer is scaled, so that predictions are from near certain to open."""
MODELS = {
    "dense": dataclasses.replace(DENSE, **_SIZES),
    "three layers": dataclasses.replace(DENSE, **_SIZES | {"num_layers": 3}),
    "experts": dataclasses.replace(SOFTMAX, moe=dataclasses.replace(SOFTMAX.moe, num_experts=4, top_k=2), **_SIZES),
    "routed by blocks": dataclasses.replace(
        BLOCKS, moe=dataclasses.replace(BLOCKS.moe, routing_block_size=GRID // 2), **_SIZES
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is written, and how."""

    model: str
    method: Method
    requests: Sequence[Request]
    batch_size: int = 3
    groups: int | None = None


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a case on one rank."""

    finished: dict[int, Finished]
    """By their streams; of all replicas where results were joined."""
    report: GenerationReport
    unchanged: bool
    """The model's weights and counters are as they were."""


def requests(count: int, grid: int | None, seed: int = 0) -> list[Request]:
    """Texts of very different lengths to be continued, and one with gaps.

    None begins with a mask: masks that see nothing else are all alike, and rounding decides which comes first.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=generator))

    made = []
    for stream in range(count):
        prompt = torch.randint(0, 120, (draw(1, 30),), generator=generator).tolist()
        if stream == 1:
            gaps = (torch.rand(len(prompt) + 6, generator=generator) < 0.4).tolist()
            made.append(infilling([*prompt, *range(6)], [False, *gaps[1:-1], True], 4, stream, grid))
        else:
            made.append(continuation(prompt, draw(1, 20), 6, stream, grid))
    return made


def write_on_ranks(cases: Sequence[Case], layout: LayoutConfig) -> list[tuple[dict[int, Finished], list[Written]]]:
    """Of each case the sequences of all replicas, and what each rank has to say."""
    parts = run_ranks(write, layout.world_size, cases, layout, timeout=120.0)
    joined = []
    for ranks in zip(*parts, strict=True):
        everywhere: dict[int, Finished] = {}
        for rank in ranks:
            for stream, each in rank.finished.items():
                assert everywhere.setdefault(stream, each) == each, "ranks of a replica disagree"
        joined.append((everywhere, list(ranks)))
    return joined


def write(cases: Sequence[Case], layout: LayoutConfig) -> list[Written]:
    """On a rank: write its replica's share of each case's requests; all replicas but the first have one each."""
    from megatron.core import parallel_state

    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(layout, 0)
    replica, replicas = parallel_state.get_data_parallel_rank(), layout.data_parallel
    models: dict[tuple[str, int | None, bool], LoadedModel] = {}
    results = []
    for case in cases:
        key = case.model, case.method.grid, isinstance(case.method.schedule, SelfSpeculation)
        loaded = models[key] = models.get(key) or load(MODELS[case.model], layout, *key[1:])
        first = max(1, len(case.requests) - replicas + 1)
        share = case.requests[:first] if replica == 0 else case.requests[first + replica - 1 : first + replica]
        before = {name: value.clone() for name, value in loaded.model.state_dict().items() if torch.is_tensor(value)}
        generator = SequenceGenerator(loaded, case.method, case.batch_size, case.groups)
        finished = {each.stream: each for step in generator.steps(share) for each in step.finished}
        after = loaded.model.state_dict()
        unchanged = all(torch.equal(value, after[name]) for name, value in before.items())
        results.append(Written(finished, generator.report, unchanged))
    torch.distributed.barrier()  # a rank that ends at once closes connections that others are still making
    return results


def load(model: ModelConfig, layout: LayoutConfig, grid: int | None, causal: bool = False) -> LoadedModel:
    """This rank's part of a model with its initial weights, the output layer sharpened; the groups must exist."""
    from llada_megatron.parallel import build
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

    run = parity_run(model, layout, block_size=grid)
    stage = build.build_run_chunks(run)[0].eval()
    if stage.post_process:
        with torch.no_grad():
            stage.output_layer.weight.mul_(_SHARPNESS)
    if causal:
        stage.use_pattern(CAUSAL)
    return LoadedModel(stage, run, Path(), {})
