"""Which weights of a model a run trains: all, all but some parts, or low-rank factors beside frozen layers (LoRA).

The names of layers are Megatron's; those of the factors' settings are PEFT's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.parsing import Refuse

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.training import TrainingConfig

FrozenPart = Literal["embedding", "output_layer", "attention", "mlp", "router", "experts", "shared_experts", "norms"]
"""Parts that a run can leave as they are: attention and mlp are the projections without their norms, mlp those of
layers without experts."""

LoRATarget = Literal[
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "experts.linear_fc1",
    "experts.linear_fc2",
    "shared_experts.linear_fc1",
    "shared_experts.linear_fc2",
]
"""Linear layers by the end of their name in Megatron: linear_fc1 and linear_fc2 are those of dense layers, of routed
experts and of shared experts."""

FACTORS = ("lora_A", "lora_B")
"""The factors of a layer, as PEFT and a checkpoint name them: `[rank, input]` and `[output, rank]`."""

EXPERTS = "mlp.experts."
SHARED_EXPERTS = "mlp.shared_experts."

_IN_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_ONE_EXPERT = re.compile(r"(?<=mlp\.experts\.)(local_experts\.\d+|experts)\.")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation (arXiv 2106.09685): every weight is frozen, and beside each targeted layer two factors are
    trained, y = x W^T + alpha / rank (x A^T) B^T. Leave the section out to train the model's own weights."""

    rank: int = 16
    """Rows of A and columns of B; on a GPU, experts compute multiples of 8 in grouped products."""
    alpha: float = 32.0
    """What the factors add is scaled by alpha / rank."""
    targets: list[LoRATarget] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    """Layers that get factors: linear_qkv, linear_proj: attention; linear_fc1 (gate and up), linear_fc2 (down): every
    feed-forward, of dense layers, routed and shared experts; with mlp., experts. or shared_experts. before it, of these
    alone."""

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def adapts(self, place: str) -> bool:
        """Whether a layer has factors, given its `place_of`."""
        return any(place == target or place.endswith(f".{target}") for target in self.targets)

    def places(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """The places of `model` that have factors, each with the width of its input and output."""
        return {place: widths for place, widths in linear_layers(model).items() if self.adapts(place)}


def place_of(name: str) -> str | None:
    """What a module or weight is called in every layer and for every expert, such as `mlp.experts.linear_fc1`; None
    outside of layers.

    Args:
        name: in the model (`….mlp.experts.local_experts.3.linear_fc1`) or in a checkpoint.
    """
    match = _IN_LAYER.fullmatch(name)
    return _ONE_EXPERT.sub("", match[1]) if match else None


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear layer that can have factors, by `place_of`, with the widths of its input and output."""
    hidden, moe = model.hidden_size, model.moe
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    found = {
        "self_attention.linear_qkv": (hidden, queries + 2 * keys),
        "self_attention.linear_proj": (queries, hidden),
    }
    feed_forwards = {}
    if moe is None or moe.leading_dense_layers:
        feed_forwards["mlp."] = model.ffn_hidden_size
    if moe is not None:
        feed_forwards[EXPERTS] = moe.expert_ffn_hidden_size
        if moe.shared_expert_ffn_hidden_size:
            feed_forwards[SHARED_EXPERTS] = moe.shared_expert_ffn_hidden_size
    for prefix, width in feed_forwards.items():
        found |= {f"{prefix}linear_fc1": (hidden, 2 * width), f"{prefix}linear_fc2": (width, hidden)}
    return found


def adapts_experts(training: TrainingConfig) -> bool:
    """Whether routed experts have factors."""
    lora = training.lora
    return lora is not None and any(lora.adapts(f"{EXPERTS}linear_fc{number}") for number in (1, 2))


def is_trained(training: TrainingConfig, name: str) -> bool:
    """Whether the parameter of this name in the model is trained."""
    if training.lora is not None:
        return name.endswith(FACTORS)
    return not training.frozen or _part_of(name) not in training.frozen


def trains(training: TrainingConfig, part: FrozenPart) -> bool:
    """Whether the weights of a part themselves are trained."""
    return training.lora is None and part not in training.frozen


def _part_of(name: str) -> FrozenPart:
    place = place_of(name)
    if "norm" in name:
        return "norms"
    if place is None:
        return "embedding" if name.startswith("embedding.") else "output_layer"
    for prefix, part in _PREFIXES.items():
        if place.startswith(prefix):
            return part
    raise ValueError(f"{name} belongs to no part of the model")


_PREFIXES: dict[str, FrozenPart] = {
    "self_attention.": "attention",
    "mlp.router.": "router",
    EXPERTS: "experts",
    SHARED_EXPERTS: "shared_experts",
    "mlp.": "mlp",
}


def check_trained_parts(training: TrainingConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Parts and layers that are there, something left to train, and nothing that the factors cannot go with."""
    _check_frozen(training, model, refuse)
    lora = training.lora
    if lora is None:
        return
    if training.frozen:
        refuse("training.frozen", "training.lora freezes every weight already; remove training.frozen")
    _check_targets(lora, model, layout, refuse)
    if lora.alpha <= 0:
        refuse("training.lora.alpha", f"{lora.alpha} must be greater than 0")
    if training.fp8 is not None:
        refuse(
            "training.lora",
            "does not go together with training.fp8: factors beside layers in FP8 were never tried; remove one of both",
        )


def _check_frozen(training: TrainingConfig, model: ModelConfig, refuse: Refuse) -> None:
    frozen, there = training.frozen, model_parts(model)
    for part in dict.fromkeys(frozen):
        if frozen.count(part) > 1:
            refuse("training.frozen", f"{part}: named twice")
        elif part == "output_layer" and model.tie_embeddings:
            refuse("training.frozen", "output_layer: the model ties it to the embedding; freeze embedding")
        elif part not in there:
            refuse("training.frozen", f"{part}: the model has none; its parts are {', '.join(there)}")
    if not set(there) - set(frozen):
        refuse("training.frozen", "nothing would be left to train; leave out a part")
    if frozen and training.fp8 is not None and training.fp8.param_gather:
        refuse(
            "training.frozen", "frozen weights have no main weights to make FP8 ones from; use fp8.param_gather false"
        )


def model_parts(model: ModelConfig) -> list[FrozenPart]:
    """The parts that a model has; a tied output layer is the embedding."""
    found: list[FrozenPart] = ["embedding", "attention", "norms"]
    if not model.tie_embeddings:
        found.append("output_layer")
    if model.moe is None or model.moe.leading_dense_layers:
        found.append("mlp")
    if model.moe is not None:
        found += ["router", "experts"]
        if model.moe.shared_expert_ffn_hidden_size:
            found.append("shared_experts")
    return found


def _check_targets(lora: LoRAConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    there = linear_layers(model)
    if not lora.targets:
        refuse("training.lora.targets", "nothing would be left to train; name a layer, such as linear_qkv")
    for target in dict.fromkeys(lora.targets):
        if lora.targets.count(target) > 1:
            refuse("training.lora.targets", f"{target}: named twice")
        elif not any(LoRAConfig(targets=[target]).adapts(place) for place in there):
            refuse("training.lora.targets", f"{target}: the model has no such layer; it has {', '.join(there)}")
    places = lora.places(model)
    narrow = min(places, key=lambda place: min(places[place]), default=None)
    if lora.rank < 1:
        refuse("training.lora.rank", f"{lora.rank} must be at least 1")
    elif narrow is not None and lora.rank > min(places[narrow]):
        refuse("training.lora.rank", f"{lora.rank} is more than {min(places[narrow])}, the width of {narrow}")
    shared = any(place.startswith(SHARED_EXPERTS) for place in places)
    if shared and layout.overlap_shared_experts:
        refuse(
            "layout.overlap_shared_experts",
            "Megatron cuts the shared expert apart, where factors beside its layers would exchange nothing; use false, "
            "or leave shared_experts out of training.lora.targets",
        )
    experts, tensor = layout.expert_tensor_parallel, layout.tensor_parallel
    if experts not in (1, tensor) and any(place.startswith(EXPERTS) for place in places):
        refuse(
            "layout.expert_tensor_parallel",
            f"{experts} with tensor_parallel {tensor}: Megatron would count some factors of the experts twice in the "
            f"gradient norm; use 1 or {tensor}",
        )
