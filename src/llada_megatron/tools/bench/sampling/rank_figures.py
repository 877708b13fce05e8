"""Sampling over several ranks: the bytes that leave a rank for a row of logits, and how busy pipeline stages are."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.presets import choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel.ranks import run_ranks
from llada_megatron.tools.bench.sampling.candidates import PresetOnModel, fitted
from llada_megatron.tools.bench.sampling.utilization import Workload, stage_reports

LAYOUTS = {"TP2": LayoutConfig(tensor_parallel=2), "TP2.PP2": LayoutConfig(tensor_parallel=2, pipeline_parallel=2)}

_TEMPERATURES = (0.0, 1.0)

_NEW_TOKENS, _TIMEOUT_S = 8, 600.0


def bytes_per_row(
    paths: dict[str, Path], presets: Sequence[PresetOnModel], layout: LayoutConfig
) -> dict[tuple[str, float], int]:
    """The most bytes that left any rank of `layout` for a row and step, by preset and temperature (0 and 1).

    Args:
        paths: of the models, by their attention.
        presets: those that can run on them.
        layout: how the models are spread.
    """
    ranks = run_ranks(_count, layout.world_size, paths, list(presets), layout, timeout=_TIMEOUT_S)
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _count(paths: dict[str, Path], presets: list[PresetOnModel], layout: LayoutConfig) -> dict[tuple[str, float], int]:
    """On a rank: write a few tokens with each of them at each temperature."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(layout, 0)
    models = {name: load_checkpoint(path, layout) for name, path in paths.items()}
    counted = {}
    for preset in presets:
        loaded = models[preset.attention]
        choice = fitted(preset, loaded)
        requests = [continuation([0, 1, 2], _NEW_TOKENS, choice.block_length, 0, choice.grid)]
        for temperature in _TEMPERATURES:
            writer = SequenceGenerator(loaded, choice.method(temperature=temperature), batch_size=1)
            for _ in writer.steps(requests):
                pass
            counted[preset.name, temperature] = writer.report.bytes_per_row
    return counted


PRESET = "fast-dllm-dual"
"""What the stages run."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Figures of the pipeline stages with one number of groups in flight."""

    busy: list[float]
    """Of each stage, the share of the time in which it computed."""
    seconds: float
    """Wall time of a sequence."""

    @property
    def mean_busy(self) -> float:
        """The mean over the stages."""
        return statistics.mean(self.busy)


def require_stages(run: RunConfig, stages: int) -> None:
    """Raises ConfigError: the layers of the run's model cannot be shared out evenly."""
    layers = run.model.num_layers
    if stages < 2 or layers % stages:
        fitting = ", ".join(str(count) for count in range(2, layers + 1) if layers % count == 0)
        raise ConfigError(f"--pipeline {stages}: the small model's {layers} layers make {fitting} stages")


def measure_stages(
    run: RunConfig, stages: int, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int, repeats: int
) -> dict[int, Stages]:
    """The figures with one group in flight and with `stages` groups, by that number.

    The weights are a new model's: what they predict does not change how long a pass takes, and few confident tokens
    make many passes.
    """
    choice = choose(PRESET, None, None, None, {}, run.objective, run.model)
    spread = dataclasses.replace(run, layout=LayoutConfig(pipeline_parallel=stages))
    count = max(len(prompts), stages * batch_size)  # every group is full
    requests = [
        continuation(prompts[stream % len(prompts)], new_tokens, choice.block_length, stream) for stream in range(count)
    ]
    method = choice.method(excluded=[run.model.mask_token_id])
    reports = stage_reports(Workload(spread, method, requests, batch_size), [1, stages], repeats, timeout=1800.0)
    return {
        groups: Stages([rank.busy_share for rank in ranks], ranks[0].seconds / count)
        for groups, ranks in reports.items()
    }
