"""Sampling with LLaDA-MoE-7B-A1B's shape: passes and tokens a second, one sequence and thirty-two, blocks of 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.fp8 import INFERENCE_RECIPES
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.initialization import draw_in_place
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.sampling.presets import choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel import device
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel, empty_chunks
from llada_megatron.parallel.fp8 import fp8_weights
from llada_megatron.parallel.sampling.cuda_graphs import Recorder, obstacle_to, recorder_of
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.parallel.sampling.stage import GenerationReport
from llada_megatron.parallel.sharded_state import apply_factories_copy
from llada_megatron.tools.bench.gpu.part_run import PartRun, release_memory
from llada_megatron.tools.bench.gpu.precisions import precisions
from llada_megatron.tools.bench.gpu.workloads import workload
from llada_megatron.tools.bench.sampling.graph_figures import Rerunner

BATCHES, TOY_BATCHES = (1, 32), (1, 2)
PRESET = "fast-dllm-dual"
"""A cache of keys and values, so that a pass runs the block alone."""
_PROMPT, _BLOCK = 256, 32
_TOY_PROMPT, _TOY_BLOCK = 8, 4
_BLOCKS, _FP8_BLOCKS = 2, 1
"""To be sampled; a pass in FP8 took more than twice as long as one in bf16."""


def cell(batch: int, graphs: bool, fp8: str | None = None) -> str:
    """The name of a measurement."""
    return f"batch {batch}, {'with' if graphs else 'without'} graphs" + (f", FP8 {fp8}" if fp8 else "")


def compare(part: PartRun) -> None:
    """The weights are a new model's: few confident tokens, so about a pass for each token."""
    batches = TOY_BATCHES if part.toy else BATCHES
    model = load_model("tiny-moe-softmax" if part.toy else "llada-moe-7b-a1b")
    run = workload(model, 64 if part.toy else 4096, 1, 1).run
    for fp8 in (None, *_recipes(part)[:1]):
        ways = [(batch, graphs) for batch in batches for graphs in (False, True)]
        if fp8 is not None:
            ways = [(max(batches), False)]
        cells = {cell(batch, graphs, fp8): (batch, graphs) for batch, graphs in ways}
        if not part.missing(cells):
            continue
        loaded = _new_model(run, fp8)
        for name, (batch, graphs) in cells.items():
            part.measure(name, _figures, part.toy, loaded, batch, graphs, _BLOCKS if fp8 is None else _FP8_BLOCKS)
            release_memory()
        del loaded
        release_memory()


def _recipes(part: PartRun) -> list[str]:
    """The recipes that a model can be sampled with on this machine."""
    names = [precision.training["fp8"].recipe for precision in precisions(part.machine) if precision.fp8]
    return [name for name in names if name in INFERENCE_RECIPES]


def _new_model(run: RunConfig, fp8: str | None) -> LoadedModel:
    if fp8 is None:
        chunks = build_run_chunks(run, draw_in_place)
    else:
        chunks = empty_chunks(run, run.layout, make_objective(run.objective).sampling_pattern(step=0), fp8)
        with torch.no_grad(), fp8_weights.filling(chunks):
            sharded = [
                each for each in nested_values(apply_factories_copy(chunks[0])) if isinstance(each, ShardedTensor)
            ]
            draw_in_place(sharded, run.training.seed, run.model.init_std, run.model.num_layers)
    return LoadedModel(chunks[0].eval(), run, Path(), {})


def _recorder(loaded: LoadedModel) -> Recorder:
    """Captures passes as CUDA graphs; without a GPU it runs the same passes of fixed shape from Python."""
    if not device.cuda_available():
        return Rerunner()
    reason = obstacle_to("auto", loaded.model)
    recorder = recorder_of("auto", loaded.model)
    if recorder is None:
        raise ResourceError(f"no pass can be captured: {reason}")
    return recorder


def _figures(toy: bool, loaded: LoadedModel, batch: int, graphs: bool, blocks: int) -> dict[str, Any]:
    prompt, block = (_TOY_PROMPT, _TOY_BLOCK) if toy else (_PROMPT, _BLOCK)
    new_tokens = block * blocks
    choice = choose(PRESET, None, None, None, {}, loaded.run.objective, loaded.run.model, block_length=block)
    method = choice.method(excluded=[loaded.run.model.mask_token_id])
    recorder = _recorder(loaded) if graphs else None

    def sampled(recorder: Recorder | None) -> tuple[GenerationReport, list[int]]:
        ids = list(range(4, 4 + prompt))
        requests = [continuation(ids, new_tokens, choice.block_length, stream) for stream in range(batch)]
        generator = SequenceGenerator(loaded, method, batch, recorder=recorder)
        finished = [each for step in generator.steps(requests) for each in step.finished]
        return generator.report, [token for each in finished for token in each.tokens[prompt:]]

    sampled(recorder)  # allocations, kernels that are compiled or chosen, passes that are captured
    report, tokens = sampled(recorder)
    same: dict[str, float] = {}
    if graphs and batch == 1:  # a pass of fixed shape runs the kernels that the graph of it replays
        alike = [one == two for one, two in zip(tokens, sampled(Rerunner())[1], strict=True)]
        same = {"same_tokens": sum(alike) / len(alike), "same_until": [*alike, False].index(False)}
    return {
        **same,
        "tokens_per_second": batch * new_tokens / report.seconds,
        "passes_per_second": report.passes / report.seconds,
        "seconds_per_pass": report.seconds / report.passes,
        "busy_share": report.busy_share,
        "passes": report.passes,
    }
