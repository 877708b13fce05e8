"""What cannot work together, found before any process starts, with the arithmetic in the message."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from llada_megatron.llada_moe.config.parsing import Origins, Problems
from llada_megatron.llada_moe.config.schema import (
    CheckpointConfig,
    LearningRateConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)
from llada_megatron.llada_moe.config.validation_layout import check_batch, check_layout
from llada_megatron.llada_moe.config.validation_recovery import check_recovery
from llada_megatron.llada_moe.config.validation_routing import check_block_routing, check_routing_of_run

DENSE_FAMILIES = ("llada", "qwen3")
MOE_FAMILIES = ("llada_moe", "llada2", "qwen3_moe")

Refuse = Callable[[str, str], None]
"""Notes that a dotted key is wrong, and why."""


def validate_model(model: ModelConfig, origins: Origins | None = None) -> None:
    """Raises: ConfigError: the architecture cannot be built."""
    refuse, problems = collector(origins)
    check_model(model, refuse)
    problems.raise_if_any()


def validate_run(run: RunConfig, origins: Origins | None = None) -> None:
    """Raises: ConfigError: with one line per combination that cannot work, at the file and line when "
    "`origins` is given."""
    refuse, problems = collector(origins)
    check_model(run.model, lambda key, message: refuse(f"model.{key}", message))
    problems.raise_if_any()  # what follows divides by the model's sizes
    check_objective(run.objective, refuse)
    check_routing_of_run(run, refuse)
    check_data(run, refuse)
    check_optimizer(run.optimizer, run.training.steps, refuse)
    check_layout(run, refuse)
    check_batch(run, refuse)
    check_reporting(run, refuse)
    check_recovery(run.recovery, lambda key, message: refuse(f"recovery.{key}", message))
    problems.raise_if_any()


def require_positive(values: dict[str, float], refuse: Refuse) -> None:
    """Refuse each key whose value is zero or negative."""
    for key, value in values.items():
        if value <= 0:
            refuse(key, f"{value} must be greater than 0")


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


def check_objective(objective: ObjectiveConfig, refuse: Refuse) -> None:
    """Noise that is a probability and never divides by zero, and blocks that are there to be seen."""
    block = objective.block_size
    if block is not None and objective.kind != "diffusion":
        refuse(
            "objective.block_size",
            f"{block} with kind {objective.kind}, whose attention is causal; remove the block size",
        )
    elif block is not None and block <= 0:
        refuse("objective.block_size", f"{block} must be greater than 0; null is full attention")
    if not 0 <= objective.replace_ratio < 1:
        refuse("objective.replace_ratio", f"{objective.replace_ratio} must be at least 0 and less than 1")
    elif objective.replace_ratio > 0 and objective.kind != "diffusion":
        refuse(
            "objective.replace_ratio",
            f"{objective.replace_ratio} with kind {objective.kind}, which has no noise; remove the replace ratio",
        )
    low, high = objective.mask_ratio_min, objective.mask_ratio_max
    if not 0 <= low < high <= 1:
        refuse(
            "objective.mask_ratio_min",
            f"the band {low} to {high} must satisfy 0 <= mask_ratio_min < mask_ratio_max <= 1",
        )
    if not 0 <= objective.epsilon < 1:
        refuse("objective.epsilon", f"{objective.epsilon} must be at least 0 and less than 1")
    elif objective.epsilon == 0 and low == 0:
        refuse(
            "objective.epsilon",
            "0 with mask_ratio_min 0 lets the mask ratio be 0, and the loss divides by it; the published value is 1e-3",
        )
    if not 0 <= objective.random_length_probability <= 1:
        refuse("objective.random_length_probability", f"{objective.random_length_probability} must lie between 0 and 1")


def check_data(run: RunConfig, refuse: Refuse) -> None:
    """A blend with something in it, and a validation part where one is used."""
    data = run.data
    if not data.sets:
        refuse("data.sets", "empty; name at least one prepared set: [{path: data/PREFIX}]")
    for i, item in enumerate(data.sets):
        if item.weight <= 0:
            refuse(f"data.sets.{i}.weight", f"{item.weight} must be greater than 0; remove the set instead")
        if not item.path:
            refuse(f"data.sets.{i}.path", "empty; it is the PREFIX that `llada prepare` wrote")
        if item.path in [earlier.path for earlier in data.sets[:i]]:
            refuse(f"data.sets.{i}.path", f"{item.path} is already in the blend; add its weights together")
    if not 0 <= data.validation_fraction < 1:
        refuse("data.validation_fraction", f"{data.validation_fraction} must be at least 0 and less than 1")
    elif run.validation.interval > 0 and data.validation_fraction == 0:
        refuse(
            "validation.interval", f"{run.validation.interval}, but data.validation_fraction 0 holds no documents out"
        )


def check_optimizer(optimizer: OptimizerConfig, steps: int, refuse: Refuse) -> None:
    """AdamW's numbers and the learning rate."""
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            refuse(f"optimizer.{key}", f"{getattr(optimizer, key)} must be at least 0 and less than 1")
    if optimizer.epsilon <= 0:
        refuse("optimizer.epsilon", f"{optimizer.epsilon} must be greater than 0")
    for key in ("weight_decay", "clip_grad_norm"):
        if getattr(optimizer, key) < 0:
            refuse(f"optimizer.{key}", f"{getattr(optimizer, key)} must not be negative")
    check_learning_rate(
        optimizer.learning_rate, steps, lambda key, message: refuse(f"optimizer.learning_rate.{key}", message)
    )


def check_learning_rate(rate: LearningRateConfig, steps: int, refuse: Refuse) -> None:
    """Warm-up, drops and decay that follow one another within the run's steps."""
    decay_start = steps - rate.decay_steps
    if rate.peak <= 0:
        refuse("peak", f"{rate.peak} must be greater than 0")
    for key in ("warmup_steps", "decay_steps"):
        if getattr(rate, key) < 0:
            refuse(key, f"{getattr(rate, key)} must not be negative")
    if rate.warmup_steps > decay_start:
        refuse(
            "decay_steps",
            f"warmup_steps {rate.warmup_steps} + decay_steps {rate.decay_steps} = "
            f"{rate.warmup_steps + rate.decay_steps} is more than training.steps {steps}",
        )
    for i, drop in enumerate(rate.drops):
        if drop.value <= 0:
            refuse(f"drops.{i}.value", f"{drop.value} must be greater than 0")
        if not rate.warmup_steps <= drop.step < decay_start:
            refuse(
                f"drops.{i}.step",
                f"{drop.step} is outside the constant part, steps {rate.warmup_steps} to {decay_start - 1}",
            )
    for i, (before, after) in enumerate(itertools.pairwise(rate.drops), start=1):
        if after.step <= before.step:
            refuse(
                f"drops.{i}.step",
                f"{after.step} does not come after the drop at step {before.step}; list them in order",
            )
    _check_final(rate, refuse)


def _check_final(rate: LearningRateConfig, refuse: Refuse) -> None:
    start = rate.drops[-1].value if rate.drops else rate.peak
    if not 0 <= rate.final <= start:
        refuse("final", f"{rate.final} must lie between 0 and the rate before the decay, {start}")
    elif rate.final > 0 and rate.decay_steps == 0:
        refuse("final", f"{rate.final} is never reached: decay_steps is 0")
    elif rate.decay_steps > 0 and rate.decay_shape == "inverse_sqrt" and rate.final == 0:
        refuse(
            "final", "an inverse square root never reaches 0; give final a value, or use decay_shape linear or cosine"
        )


def check_reporting(run: RunConfig, refuse: Refuse) -> None:
    """Intervals and the folder that results go to."""
    at_least_one = {
        "checkpoint.interval": run.checkpoint.interval,
        "checkpoint.keep_last": run.checkpoint.keep_last,
        "checkpoint.max_failures": run.checkpoint.max_failures,
        "logging.interval": run.logging.interval,
        "validation.sequences": run.validation.sequences,
    }
    require_positive(at_least_one, refuse)
    if run.validation.interval < 0:
        refuse("validation.interval", f"{run.validation.interval} must not be negative; 0 means never")
    if not run.output_dir:
        refuse("output_dir", "empty; name the folder for checkpoints, metrics and logs")
    _check_checkpoint(run.checkpoint, run.output_dir, refuse)


def _check_checkpoint(checkpoint: CheckpointConfig, output_dir: str, refuse: Refuse) -> None:
    if checkpoint.keep_every < 0:
        refuse("checkpoint.keep_every", f"{checkpoint.keep_every} must not be negative; 0 keeps none for ever")
    elif checkpoint.interval > 0 and checkpoint.keep_every % checkpoint.interval:
        refuse(
            "checkpoint.keep_every",
            f"{checkpoint.keep_every} is not a multiple of checkpoint.interval {checkpoint.interval}, so most of these "
            "steps would not be saved",
        )
    if checkpoint.copy_to is None:
        return
    own = [Path(output_dir).absolute(), Path(output_dir).absolute() / "checkpoints"]
    if not checkpoint.copy_to or Path(checkpoint.copy_to).absolute() in own:
        refuse("checkpoint.copy_to", f"{checkpoint.copy_to!r} must name another folder than output_dir; null = none")


def collector(origins: Origins | None) -> tuple[Refuse, Problems]:
    """What notes that a key is wrong, at the place where it was written, and what raises all that was noted."""
    problems, places = Problems(), origins or Origins()
    return lambda key, message: problems.add(places.where(key), key, message), problems
