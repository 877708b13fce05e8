"""Sampling with LLaDA-MoE-7B-A1B's shape: passes and tokens a second, one sequence and thirty-two, blocks of 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.initialization import draw_in_place
from llada_megatron.llada_moe.sampling.presets import choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel import device
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.cuda_graphs import Recorder, obstacle_to, recorder_of
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.tools.bench.gpu.part_run import PartRun, release_memory
from llada_megatron.tools.bench.gpu.workloads import workload
from llada_megatron.tools.bench.sampling.graph_figures import Rerunner

BATCHES, TOY_BATCHES = (1, 32), (1, 2)
PRESET = "fast-dllm-dual"
"""A cache of keys and values, so that a pass runs the block alone."""
_PROMPT, _NEW_TOKENS, _BLOCK = 256, 64, 32
_TOY_PROMPT, _TOY_NEW_TOKENS, _TOY_BLOCK = 8, 8, 4


def cell(batch: int, graphs: bool) -> str:
    """The name of a measurement."""
    return f"batch {batch}, {'with' if graphs else 'without'} graphs"


def compare(part: PartRun) -> None:
    """The weights are a new model's: few confident tokens, so about a pass for each token."""
    batches = TOY_BATCHES if part.toy else BATCHES
    cells = {cell(batch, graphs): (batch, graphs) for batch in batches for graphs in (False, True)}
    if not part.missing(cells):
        return
    model = load_model("tiny-moe-softmax" if part.toy else "llada-moe-7b-a1b")
    run = workload(model, 64 if part.toy else 4096, 1, 1).run
    loaded = LoadedModel(build_run_chunks(run, draw_in_place)[0].eval(), run, Path(), {})
    for name, (batch, graphs) in cells.items():
        part.measure(name, _figures, part.toy, loaded, batch, graphs)
        release_memory()


def _recorder(loaded: LoadedModel) -> Recorder:
    """Captures passes as CUDA graphs; without a GPU it runs the same passes of fixed shape from Python."""
    if not device.cuda_available():
        return Rerunner()
    reason = obstacle_to("auto", loaded.model)
    recorder = recorder_of("auto", loaded.model)
    if recorder is None:
        raise ResourceError(f"no pass can be captured: {reason}")
    return recorder


def _figures(toy: bool, loaded: LoadedModel, batch: int, graphs: bool) -> dict[str, Any]:
    prompt, new_tokens, block = (_TOY_PROMPT, _TOY_NEW_TOKENS, _TOY_BLOCK) if toy else (_PROMPT, _NEW_TOKENS, _BLOCK)
    choice = choose(PRESET, None, None, None, {}, loaded.run.objective, loaded.run.model, block_length=block)
    method = choice.method(excluded=[loaded.run.model.mask_token_id])
    recorder = _recorder(loaded) if graphs else None

    def sampled(tokens: int) -> SequenceGenerator:
        ids = list(range(4, 4 + prompt))
        requests = [continuation(ids, tokens, choice.block_length, stream) for stream in range(batch)]
        generator = SequenceGenerator(loaded, method, batch, recorder=recorder)
        for _ in generator.steps(requests):
            pass
        return generator

    sampled(new_tokens)  # allocations, kernels that are compiled or chosen, passes that are captured
    report = sampled(new_tokens).report
    return {
        "tokens_per_second": batch * new_tokens / report.seconds,
        "passes_per_second": report.passes / report.seconds,
        "seconds_per_pass": report.seconds / report.passes,
        "busy_share": report.busy_share,
        "passes": report.passes,
    }
