"""A program for test_parameters.py: builds models on the meta device, one rank at a time, and counts their parameters.

Cases (model, overrides, layout, rank) come as JSON on stdin: process groups and Megatron's state are one per process.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator

from llada_megatron.parallel import device

warnings.filterwarnings("ignore")
device.install()

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from llada_megatron.llada_moe.config import load_model  # noqa: E402
from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.config.model import ModelConfig  # noqa: E402  # noqa: E402
from llada_megatron.llada_moe.model.transformer import (  # noqa: E402
    DiffusionTransformer,
    build_model,
)
from llada_megatron.parallel.build import transformer_config  # noqa: E402
from llada_megatron.parallel.topology import make_groups  # noqa: E402


def join(layout: LayoutConfig, rank: int) -> None:
    """Process groups that know their sizes and ranks and communicate nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    make_groups(layout)
    model_parallel_cuda_manual_seed(0)


def leave() -> None:
    """Undo `join`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def parts_of_rank(model: ModelConfig, layout: LayoutConfig) -> Iterator[DiffusionTransformer]:
    """This rank's chunks, built on the meta device."""
    stage, last = parallel_state.get_pipeline_model_parallel_rank(), layout.pipeline_parallel - 1
    chunks = layout.pipeline_chunks_per_rank
    for chunk in range(chunks):
        with device.on_meta():
            part = build_model(
                model,
                transformer_config(model, layout),
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == last and chunk == chunks - 1,
                vp_stage=chunk if chunks > 1 else None,
            )
        yield part


def count(model: ModelConfig, layout: LayoutConfig) -> dict[str, object]:
    """Parameters, expert-bias values and layer numbers (from 0) of this rank's chunks."""
    found = {"parameters": 0, "expert_bias": 0, "layers": [], "expert": parallel_state.get_expert_model_parallel_rank()}
    for part in parts_of_rank(model, layout):
        found["parameters"] += sum(parameter.numel() for parameter in part.parameters())
        found["expert_bias"] += sum(
            value.numel() for name, value in part.named_buffers() if name.endswith("expert_bias")
        )
        found["layers"] += [layer.layer_number - 1 for layer in part.decoder.layers]
    return found


def main() -> None:
    """One result per case."""
    results = []
    for case in json.load(sys.stdin):
        layout = LayoutConfig(**case["layout"])
        join(layout, case["rank"])
        results.append(count(load_model(case["model"], case["overrides"]), layout))
        leave()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
