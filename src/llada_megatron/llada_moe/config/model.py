"""The architecture of a model: what every key means, its published default and its source, and what cannot work.

Sources named below: PMOE = arXiv 2509.24389 (LLaDA-MoE); L2 = the LLaDA2.0 report and the published configuration of
inclusionAI/LLaDA2.0-*; PV2 = arXiv 2608.03457 (LLaDA MoE v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llada_megatron.llada_moe.config.parsing import Origins, Refuse, collector, require_positive, to_dict


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-Experts part of a model. Widths are per expert, in units of hidden features."""

    num_experts: int
    top_k: int
    expert_ffn_hidden_size: int
    shared_expert_ffn_hidden_size: int = 0
    """Width of the always-on shared expert (LLaDA2: one expert wide); 0 = none (LLaDA-MoE)."""
    leading_dense_layers: int = 0
    """Layers at the bottom that keep a dense feed-forward (LLaDA2: `first_k_dense_replace` 1)."""
    score_function: Literal["softmax", "softmax_normalized", "sigmoid"] = "softmax"
    """softmax over all experts, then top-k, not renormalised (PMOE); softmax_normalized, the same divided by the sum
    over the chosen (PV2, Qwen3-MoE); sigmoid, normalised over the chosen (L2)."""
    expert_bias: bool = False
    """A bias that takes part in the selection only (aux-loss-free balancing; L2)."""
    expert_bias_update_rate: float = 0.0
    """Step of the bias update; 0 freezes it, as LLaDA2's released training code does."""
    num_expert_groups: int = 1
    expert_groups_top_k: int = 1
    """Group-limited routing: keep the best groups by the sum of their two best scores (L2: 8 groups, 4 kept)."""
    expert_capacity: int = 0
    """Block routing (LLaDA2.2: 48): the tokens of a block share these many experts, the best by the block's highest
    score, and each takes its top_k among them; 0 = each token chooses among all."""
    routing_block_size: int = 32
    """Positions of such a block, counted from the start of each document (LLaDA2.2: 32)."""
    routed_scaling_factor: float = 1.0
    aux_loss_coefficient: float = 0.0
    """Balance loss N * sum f_i P_i (PMOE: 0.01)."""
    z_loss_coefficient: float = 0.0
    """Router logsumexp^2 (PMOE: 0.001)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one masked diffusion (or autoregressive) Transformer."""

    family: Literal["llada", "llada_moe", "llada2", "qwen3", "qwen3_moe"]
    """Which published family the architecture follows (used by conversion). Models of qwen3 and qwen3_moe start from
    autoregressive checkpoints and have no published format of their own."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the dense SwiGLU feed-forward; of the leading dense layers in a MoE model."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    delete_token_id: int | None = None
    """Predicted where a token is to be deleted (LLaDA2.2: 156930); null = the model was not trained to."""
    insert_token_id: int | None = None
    """Predicted where one is to be inserted before a token (LLaDA2.2: 156931, published as `split_token_id`)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rotary_fraction: float = 1.0
    """Part of each head's features that is rotated (LLaDA2: 0.5)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before the rotation (LLaDA-MoE, LLaDA2)."""
    tie_embeddings: bool = False
    init_std: float = 0.02
    moe: MoEConfig | None = None

    @property
    def special_ids(self) -> set[int]:
        """Ids that are no text."""
        ids = (self.mask_token_id, self.eos_token_id, self.delete_token_id, self.insert_token_id)
        return {i for i in ids if i is not None}

    @property
    def never_drafted(self) -> set[int]:
        """Ids that a model does not write into its own draft; the end of text it does."""
        return self.special_ids - {self.eos_token_id}


MOST_LAYERS, MOST_EXPERTS = 10_000, 65_536
"""Ten times the deepest published Transformers, and more experts than any: what counts and lays out a model walks over
all of them."""

DENSE_FAMILIES = ("llada", "qwen3")

MOE_FAMILIES = ("llada_moe", "llada2", "qwen3_moe")


def validate_model(model: ModelConfig, origins: Origins | None = None) -> None:
    """Raises: ConfigError: the architecture cannot be built."""
    refuse, problems = collector(origins)
    check_model(model, refuse)
    problems.raise_if_any()


def check_model(model: ModelConfig, refuse: Refuse) -> None:
    """Widths, heads, token ids and the MoE part of a model."""
    sizes = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    positive = (*sizes, "max_sequence_length", "rms_norm_eps", "rope_theta", "init_std")
    require_positive({key: getattr(model, key) for key in positive}, refuse)
    if model.num_layers > MOST_LAYERS:
        refuse("num_layers", f"{model.num_layers} must be at most {MOST_LAYERS}")
    if model.num_key_value_heads > 0 and model.num_attention_heads % model.num_key_value_heads:
        refuse(
            "num_key_value_heads",
            f"{model.num_key_value_heads} does not divide num_attention_heads {model.num_attention_heads}",
        )
    rotated = model.head_dim * model.rotary_fraction
    if not 0 < model.rotary_fraction <= 1 or rotated % 2:
        refuse(
            "rotary_fraction",
            f"head_dim {model.head_dim} x rotary_fraction {model.rotary_fraction} = {rotated:g} must be an even "
            "number of features, at most head_dim",
        )
    check_special_tokens(model, refuse)
    families = DENSE_FAMILIES if model.moe is None else MOE_FAMILIES
    if model.family not in families:
        kind = "a dense model" if model.moe is None else "a MoE model"
        usable = " or ".join(families)
        refuse("family", f"{model.family} cannot hold {kind} (no published checkpoint does); use {usable}")
    if model.moe is not None:
        check_moe(model.moe, model.num_layers, lambda key, message: refuse(f"moe.{key}", message))


def check_special_tokens(model: ModelConfig, refuse: Refuse) -> None:
    """Ids of the vocabulary that each mean one thing."""
    keys = ("mask_token_id", "eos_token_id", "delete_token_id", "insert_token_id")
    ids = {key: getattr(model, key) for key in keys if getattr(model, key) is not None}
    for key, value in ids.items():
        if not 0 <= value < model.vocab_size:
            refuse(key, f"{value} is outside the vocabulary of {model.vocab_size} (0 to {model.vocab_size - 1})")
    if model.mask_token_id == model.eos_token_id:
        refuse("mask_token_id", f"{model.mask_token_id} is also eos_token_id; text that ends would look masked")
    if (model.delete_token_id is None) != (model.insert_token_id is None):
        refuse("insert_token_id", "a model has delete_token_id and insert_token_id, or neither; give both")
    for key in keys[2:]:
        same = [other for other, value in ids.items() if value == ids.get(key) and keys.index(other) < keys.index(key)]
        if key in ids and same:
            refuse(key, f"{ids[key]} is also {same[0]}; it could not be told from it")


def check_moe(moe: MoEConfig, num_layers: int, refuse: Refuse) -> None:
    """Experts, groups and balancing."""
    positive = (
        "num_experts",
        "top_k",
        "expert_ffn_hidden_size",
        "num_expert_groups",
        "expert_groups_top_k",
        "routed_scaling_factor",
    )
    require_positive({key: getattr(moe, key) for key in positive}, refuse)
    not_negative = (
        "shared_expert_ffn_hidden_size",
        "expert_bias_update_rate",
        "aux_loss_coefficient",
        "z_loss_coefficient",
    )
    for key in not_negative:
        if getattr(moe, key) < 0:
            refuse(key, f"{getattr(moe, key)} must not be negative")
    if moe.num_experts > MOST_EXPERTS:
        refuse("num_experts", f"{moe.num_experts} must be at most {MOST_EXPERTS}")
    if moe.top_k > moe.num_experts:
        refuse("top_k", f"{moe.top_k} experts per token, but there are only {moe.num_experts}")
    if not 0 <= moe.leading_dense_layers < num_layers:
        refuse(
            "leading_dense_layers",
            f"{moe.leading_dense_layers} of {num_layers} layers leaves no MoE layer; use 0 to {num_layers - 1}, "
            "or `moe: null`",
        )
    if moe.num_expert_groups > 0 and moe.expert_groups_top_k > 0:
        _check_groups(moe, refuse)
    check_block_routing(moe, refuse)
    if moe.score_function == "softmax_normalized":
        _check_normalized(moe, refuse)
    if moe.expert_bias and moe.score_function != "sigmoid":
        refuse("expert_bias", "needs score_function sigmoid (Megatron adds the bias to sigmoid scores only)")
    if moe.expert_bias_update_rate > 0 and not moe.expert_bias:
        refuse(
            "expert_bias_update_rate",
            f"{moe.expert_bias_update_rate} updates a bias that is not there; set expert_bias: true",
        )


def _check_normalized(moe: MoEConfig, refuse: Refuse) -> None:
    if moe.top_k == 1:
        refuse("top_k", "1 with score_function softmax_normalized gives every weight 1, and the router learns nothing")
    if moe.num_expert_groups != 1:
        refuse(
            "num_expert_groups",
            f"{moe.num_expert_groups} with score_function softmax_normalized: Megatron would score the groups by sums "
            "of logits; use 1",
        )


def _check_groups(moe: MoEConfig, refuse: Refuse) -> None:
    groups, kept = moe.num_expert_groups, moe.expert_groups_top_k
    if moe.num_experts % groups:
        refuse("num_expert_groups", f"{groups} does not divide num_experts {moe.num_experts}")
    if kept > groups:
        refuse("expert_groups_top_k", f"{kept} groups kept, but there are only {groups}")
    elif moe.top_k % kept:
        refuse(
            "expert_groups_top_k",
            f"{kept} does not divide top_k {moe.top_k} (a group is scored by its top_k / expert_groups_top_k best "
            "experts)",
        )
    elif moe.top_k > kept * (moe.num_experts // groups):
        refuse(
            "top_k",
            f"{moe.top_k} experts per token, but {kept} groups of {moe.num_experts // groups} hold only "
            f"{kept * (moe.num_experts // groups)}",
        )


def check_block_routing(moe: MoEConfig, refuse: Refuse) -> None:
    """The experts of a block hold a token's choice, and nothing else limits it."""
    capacity = moe.expert_capacity
    if moe.routing_block_size < 1:
        refuse("routing_block_size", f"{moe.routing_block_size} must be greater than 0")
    if capacity < 0:
        refuse("expert_capacity", f"{capacity} must not be negative; 0 lets each token choose among all experts")
    if capacity <= 0:
        return
    if capacity < moe.top_k:
        refuse("expert_capacity", f"{capacity} experts for a block, but each of its tokens takes top_k {moe.top_k}")
    if capacity > moe.num_experts:
        refuse("expert_capacity", f"{capacity} experts for a block, but there are only {moe.num_experts}")
    if moe.score_function != "sigmoid" or not moe.expert_bias:
        refuse(
            "expert_capacity",
            f"{capacity} needs score_function sigmoid and expert_bias: true (the choice is closed through the bias)",
        )
    if moe.num_expert_groups != 1:
        refuse(
            "num_expert_groups",
            f"{moe.num_expert_groups} with expert_capacity {capacity}: experts are limited by block or by group, not "
            "by both; use 1",
        )


TRAINING_ONLY = frozenset(
    {"init_std", "moe.aux_loss_coefficient", "moe.z_loss_coefficient", "moe.expert_bias_update_rate"}
)
"""Keys that act in training alone."""


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Dotted keys and values of `model`, without those that act in training alone."""
    values = to_dict(model)
    moe = values.pop("moe") or {}
    flat = values | {f"moe.{key}": value for key, value in moe.items()}
    return {key: value for key, value in flat.items() if key not in TRAINING_ONLY}
