"""Saving and loading a checkpoint of as many layers as the disk has room for: weights and optimizer."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.sharded_state import load_model_state, model_state
from llada_megatron.parallel.training.distributed_optimizer import load_optimizer_state, optimizer_state
from llada_megatron.tools.bench.gpu import workloads
from llada_megatron.tools.bench.gpu.part_run import PartRun
from llada_megatron.tools.bench.gpu.step_speed import built
from llada_megatron.tools.bench.gpu.workloads import Workload
from llada_megatron.tools.bench.our_step import OurStep

CELL = "save and load"
_BYTES_PER_PARAMETER = 14
"""bf16 weights, fp32 main weights and two moments."""
_MOST_BYTES = 12e9
_DISK_SHARE = 0.4


def compare(part: PartRun) -> None:
    """Beside the results: that is where there is room, by the choice of who runs this."""
    if not part.missing([CELL]):
        return
    folder = part.results.path.parent
    work = as_large_as_fits(workloads.dense(part.toy), min(_MOST_BYTES, _DISK_SHARE * shutil.disk_usage(folder).free))
    with built(work) as step, tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as directory:
        step.step_on(work.batch(documents=1))  # the optimizer has its state from the first step on
        part.measure(CELL, _figures, work, step, Path(directory))


def as_large_as_fits(work: Workload, room: float) -> Workload:
    """The same with as many layers as make a checkpoint of at most `room` bytes.

    Raises:
        ResourceError: one layer is too much.
    """
    model = work.run.model
    for layers in range(model.num_layers, 0, -1):
        smaller = dataclasses.replace(model, num_layers=layers)
        if _BYTES_PER_PARAMETER * count_parameters(smaller).total <= room:
            return dataclasses.replace(work, run=dataclasses.replace(work.run, model=smaller))
    raise ResourceError(f"a checkpoint of one layer needs more than the {room / 1e9:.1f} GB that may be used here")


def _figures(work: Workload, step: OurStep, directory: Path) -> dict[str, Any]:
    store = CheckpointStore(directory)
    began = time.perf_counter()
    model = model_state([step.chunk])
    optimizer = optimizer_state(step.optimizer, model, loading=False)
    store.save(1, model | {"optimizer": optimizer}, {"model": to_dict(work.run.model), "step": 1})
    saved = time.perf_counter()
    path = store.directory_of(1)
    size = sum(file.stat().st_size for file in path.iterdir())
    began_loading = time.perf_counter()
    template = model_state([step.chunk])
    state, _ = CheckpointStore(directory).load(
        path, template | {"optimizer": optimizer_state(step.optimizer, template, loading=True)}
    )
    load_model_state([step.chunk], state)
    load_optimizer_state(step.optimizer, model_state([step.chunk]), state["optimizer"])
    loaded = time.perf_counter()
    return {
        "gb": size / 1e9,
        "layers": work.run.model.num_layers,
        "save_gb_per_second": size / 1e9 / (saved - began),
        "load_gb_per_second": size / 1e9 / (loaded - began_loading),
    }
