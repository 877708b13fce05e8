"""A program for test_placement.py: which boxes of which weights each rank of a layout asks for.

Cases (model, overrides, layout) come as JSON, one a line; the models are built on the meta device.
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from tests.llada_moe.model import meta_builds  # prepares Megatron for a machine without a GPU: before what imports it

from megatron.core import parallel_state  # isort: skip
from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip

from llada_megatron.llada_moe.config import load_model  # isort: skip
from llada_megatron.llada_moe.config.layout import LayoutConfig  # isort: skip

from llada_megatron.llada_moe.config.model import ModelConfig  # isort: skip
from llada_megatron.parallel import sharded_state  # isort: skip


def boxes(model: ModelConfig, layout: LayoutConfig) -> list[tuple[str, list[int], list[int], list[int]]]:
    """Key, global shape, offsets and sizes of all that this rank's chunks are loaded from."""
    found = []
    for part in meta_builds.parts_of_rank(model, layout):
        for entry in nested_values(sharded_state.apply_factories_copy(part)):
            sizes = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            found.append((entry.key, list(entry.global_shape), list(entry.global_offset), list(sizes)))
    return found


def main() -> None:
    """One line per case: the boxes of every rank."""
    for line in sys.stdin:
        case = json.loads(line)
        model, layout = load_model(case["model"], case["overrides"]), LayoutConfig(**case["layout"])
        ranks = []
        for rank in range(layout.world_size):
            meta_builds.join(layout, rank)
            ranks.append(boxes(model, layout))
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        print(json.dumps(ranks), flush=True)


if __name__ == "__main__":
    main()
