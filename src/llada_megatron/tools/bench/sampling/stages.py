"""How busy pipeline stages are with one group of sequences in flight, and with as many as there are stages."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.presets import choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.tools.bench.sampling.utilization import Workload, stage_reports

PRESET = "fast-dllm-dual"


@dataclasses.dataclass(frozen=True)
class Stages:
    """What one number of groups made of the stages."""

    busy: list[float]
    """Of each stage, the share of the time in which it computed."""
    seconds: float
    """Wall time of a sequence."""

    @property
    def mean_busy(self) -> float:
        """Over the stages."""
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
    """By the number of groups in flight, one and `stages`.

    The weights are a new model's: what they predict does not change how long a pass takes, and few confident tokens
    make many passes.
    """
    choice = choose(PRESET, None, None, None, {}, run.objective, run.model)
    spread = dataclasses.replace(run, layout=LayoutConfig(pipeline_parallel=stages))
    count = max(len(prompts), stages * batch_size)  # every group is full
    drafts = [
        continuation(prompts[stream % len(prompts)], new_tokens, choice.block_length, stream) for stream in range(count)
    ]
    method = choice.method(excluded=[run.model.mask_token_id])
    reports = stage_reports(Workload(spread, method, drafts, batch_size), [1, stages], repeats, timeout=1800.0)
    return {
        groups: Stages([rank.busy_share for rank in ranks], ranks[0].seconds / count)
        for groups, ranks in reports.items()
    }
