"""`llada convert upcycle`: a mixture of experts from a dense checkpoint, which computes the same before its first step.

Every expert is a copy of the dense feed-forward E, so whichever experts a token takes, the layer gives
f * (w_1 + … + w_k) * E(x), with the routed scaling factor f and the weights w of the chosen experts. Where these add up
to a constant c, the down projection is divided by f * c. They do where the router divides by their sum (c = 1), and
where every expert is chosen. A softmax over all experts whose k largest are taken as they are gives k / experts only
while the router knows no difference: there it is drawn so small that the sums agree to a few parts in a million, and
the choice is still random. A shared expert adds nothing at first: its down projection is zero, and learns. Source of
the method: sparse upcycling (arXiv 2212.05055); of a factor for the weights: arXiv 2410.07524.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.loader import load_model
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig, architecture, validate_model
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.weights import Unit, Weight, units
from llada_megatron.llada_moe.model.initialization import draw
from llada_megatron.tools.convert.derived import Derived, derive
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.source import kept_dtype, require_finite

NEARLY_EQUAL = 1e-6
"""Standard deviation of a router's logits where the weights of the chosen experts must add up alike for all tokens."""
_DENSE = {weights.EXPERT_UP: weights.DENSE_UP, weights.EXPERT_DOWN: weights.DENSE_DOWN}
_DRAWN = (weights.ROUTER, weights.SHARED_UP)
_ZERO = (weights.EXPERT_BIAS, weights.SHARED_DOWN)
_MOST_DIFFERENCES = 6


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Options of an upcycling."""

    model: str | None = None
    """Name or YAML file of the model to make; None = that of the parent, with the following experts."""
    experts: int = 0
    top_k: int = 2
    leading_dense_layers: int = 0
    layout: LayoutConfig
    dtype: torch.dtype | None = None
    """dtype of the written weights; None = as they are stored."""
    seed: int = 0
    """Of the router's weights."""
    workers: int = 1


def upcycle_checkpoint(path: Path, target: Path, options: UpcycleOptions) -> dict[str, Any]:
    """Make a mixture of experts in `target` from the dense sharded checkpoint `path`.

    Returns:
        a summary: number of experts, tensors, parameters, bytes, path of the checkpoint, notes.

    Raises:
        CheckpointError: the source is damaged or has experts already, or a weight is no finite number.
        ConfigError: the model to make cannot hold copies of the parent's feed-forward, or cannot be cut for the layout,
            or the target is not empty.
        ResourceError: no space is left; the same command continues once there is some.
    """
    source = ShardedSource(path)
    if source.model.moe is not None:
        raise CheckpointError(
            f"{source.directory} has {source.model.moe.num_experts} experts already: only a dense model is upcycled"
        )
    notes = source.require_whole()
    model, moe = _model(source.model, options)
    dtypes = {unit: _dtype(source, unit, options.dtype) for unit in units(model)}
    experts = _Experts(source, model, moe, dtypes, options.seed)
    derived = Derived(
        sources=[source],
        model=model,
        layout=options.layout,
        dtypes=dtypes,
        read=experts.read,
        step=int(source.metadata["step"]),
        facts={"upcycled": {"from": str(source.directory), "experts": moe.num_experts, "seed": options.seed}},
    )
    plan = {"direction": "upcycle", "--dtype": str(options.dtype), "--seed": options.seed}
    summary = derive(target, derived, plan, options.workers, "upcycling")
    return {"experts": moe.num_experts, **summary, "notes": notes + _rounding(moe, dtypes)}


def _model(parent: ModelConfig, options: UpcycleOptions) -> tuple[ModelConfig, MoEConfig]:
    """The model to make, and its experts."""
    if options.model is None:
        moe = MoEConfig(
            num_experts=options.experts,
            top_k=options.top_k,
            expert_ffn_hidden_size=parent.ffn_hidden_size,
            leading_dense_layers=options.leading_dense_layers,
            score_function="sigmoid",
        )
        model = replace(parent, family="llada2", moe=moe)
        validate_model(model)
        return model, moe
    model = load_model(options.model)
    if model.moe is None:
        raise ConfigError(f"--model {options.model} has no experts: give one with a `moe` section")
    wanted, given = architecture(parent), architecture(model)
    names = [key for key in wanted if key != "family" and not key.startswith("moe.") and wanted[key] != given[key]]
    if names:
        found = "; ".join(
            f"{key} is {given[key]}, and {wanted[key]} in the parent" for key in names[:_MOST_DIFFERENCES]
        )
        raise ConfigError(
            f"--model {options.model} is not the dense model with experts: {found}. Take the parent's values"
        )
    width = model.moe.expert_ffn_hidden_size
    if width != parent.ffn_hidden_size:
        raise ConfigError(
            f"--model {options.model}: moe.expert_ffn_hidden_size is {width}, and the parent's feed-forward is "
            f"{parent.ffn_hidden_size} wide; every expert is a copy of it, so set {parent.ffn_hidden_size}"
        )
    return model, model.moe


def weight_sum(moe: MoEConfig) -> float:
    """What the weights of a token's experts add up to, before the routed scaling factor, if its logits are all 0."""
    if moe.score_function == "softmax":
        return moe.top_k / moe.num_experts
    return 0.5 if moe.score_function == "sigmoid" and moe.top_k == 1 else 1.0


def sum_is_constant(moe: MoEConfig) -> bool:
    """Whether the weights of a token's experts add up to the same for any logits."""
    if moe.score_function == "softmax":
        return moe.top_k == moe.num_experts
    return moe.score_function == "softmax_normalized" or moe.top_k > 1


def _dtype(source: ShardedSource, unit: Unit, wanted: torch.dtype | None) -> torch.dtype:
    if unit.weight.pattern == weights.EXPERT_BIAS:
        return torch.float32
    same = unit if unit.weight.key in source.reader.tensors else None
    stored = source.dtype(same) if same else source.reader.tensors[_dense_key(unit.weight)][0]
    return kept_dtype(unit, stored, wanted)


def _dense_key(weight: Weight) -> str:
    """The weight of the parent's layer whose dtype, and for experts whose values, a new weight takes."""
    return _DENSE.get(weight.pattern, weights.DENSE_UP).format(layer=weight.layer)


def _rounding(moe: MoEConfig, dtypes: dict[Unit, torch.dtype]) -> list[str]:
    """A note, where the division of the down projections is not exact."""
    divisor = moe.routed_scaling_factor * weight_sum(moe)
    lossy = any(unit.weight.pattern == weights.EXPERT_DOWN and dtype != torch.float32 for unit, dtype in dtypes.items())
    if not lossy or math.frexp(divisor)[0] == 0.5:
        return []
    return [
        f"the down projections were divided by {divisor:g} and rounded to bf16, so that the logits differ from the "
        "parent's by as much; --dtype fp32, or a moe.routed_scaling_factor that makes it a power of two, avoids that"
    ]


class _Experts:
    """The weights of the model to make, unit by unit."""

    def __init__(
        self, source: ShardedSource, model: ModelConfig, moe: MoEConfig, dtypes: dict[Unit, torch.dtype], seed: int
    ) -> None:
        self._source, self._model, self._dtypes, self._seed = source, model, dtypes, seed
        self._divisor = moe.routed_scaling_factor * weight_sum(moe)
        # the router reads normalised features, so its logits have the standard deviation std x sqrt(hidden)
        small = NEARLY_EQUAL / math.sqrt(model.hidden_size)
        self._router_std = model.init_std if sum_is_constant(moe) else small

    def read(self, unit: Unit) -> torch.Tensor:
        """The tensor of a unit, in the dtype to be written."""
        dtype, pattern = self._dtypes[unit], unit.weight.pattern
        if pattern in _ZERO:
            return torch.zeros(unit.shape, dtype=dtype)
        if pattern in _DRAWN:
            std = self._router_std if pattern == weights.ROUTER else self._model.init_std
            return draw(self._seed, (unit.weight.key,), unit.weight.shape, std)[unit.start : unit.stop].to(dtype)
        if pattern not in _DENSE:
            return self._parent(unit)
        copied = self._parent(self._dense_unit(unit))
        if pattern == weights.EXPERT_DOWN:
            copied = copied.float() / self._divisor
        return copied.to(dtype)

    def _parent(self, unit: Unit) -> torch.Tensor:
        tensor = self._source.read(unit, self._dtypes.get(unit))
        require_finite(self._source, unit, tensor)
        return tensor

    def _dense_unit(self, unit: Unit) -> Unit:
        """The rows of the parent's feed-forward that a unit of an expert holds."""
        weight = Weight(_DENSE[unit.weight.pattern], unit.weight.layer, 0, unit.weight.shape)
        return Unit(weight, None, unit.start, unit.stop)
