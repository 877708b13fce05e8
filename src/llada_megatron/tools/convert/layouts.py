"""The layout that `--layout` names, checked against the model."""

from __future__ import annotations

from llada_megatron.llada_moe.config.schema import LayoutConfig, RunConfig
from llada_megatron.llada_moe.config.validation_layout import check_layout, data_parallel_for_experts
from llada_megatron.llada_moe.errors import ConfigError

AXES = ("tensor_parallel", "pipeline_parallel", "pipeline_chunks_per_rank", "expert_parallel", "expert_tensor_parallel")
"""The axes that cut weights; the others hold copies."""


def parse_layout(text: str | None) -> LayoutConfig:
    """`tensor_parallel=2,expert_parallel=4` as a layout with as many data-parallel ranks as the experts need.

    Raises:
        ConfigError: an axis that cuts no weights or is given twice, or a value that is no number from 1.
    """
    axes: dict[str, int] = {}
    for word in text.split(",") if text else ():
        name, _, value = word.strip().partition("=")
        if name not in AXES or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--layout {word}: it takes {', '.join(f'{axis}=N' for axis in AXES)}, with commas")
        if name in axes:
            raise ConfigError(f"--layout {text}: {name} twice")
        axes[name] = int(value)
    tensor = axes.get("tensor_parallel", 1)
    data = data_parallel_for_experts(tensor, axes.get("expert_parallel", 1), axes.get("expert_tensor_parallel", 1))
    return LayoutConfig(**axes, data_parallel=data, sequence_parallel=tensor > 1)


def require_layout(run: RunConfig) -> None:
    """Raises: ConfigError: the run's model cannot be cut as its layout says; with every reason."""
    reasons: list[str] = []
    check_layout(run, lambda key, reason: reasons.append(f"{key.removeprefix('layout.')}: {reason}"))
    if reasons:
        raise ConfigError(f"--layout: {'; '.join(reasons)}")
