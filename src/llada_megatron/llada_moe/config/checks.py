"""All that cannot work in a run, found before any process starts: the checks that stand beside each section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.data import check_data
from llada_megatron.llada_moe.config.fp8 import check_fp8, check_param_gather
from llada_megatron.llada_moe.config.intervals import check_reporting
from llada_megatron.llada_moe.config.layout import check_layout
from llada_megatron.llada_moe.config.model import MoEConfig, check_model
from llada_megatron.llada_moe.config.objective import ObjectiveConfig, check_embedding_noise, check_noise, check_pairs
from llada_megatron.llada_moe.config.optimizer import check_optimizer
from llada_megatron.llada_moe.config.parsing import Origins, Refuse, collector
from llada_megatron.llada_moe.config.recovery import check_recovery
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.trained_parts import check_trained_parts
from llada_megatron.llada_moe.config.training import check_batch
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.model.patterns import AttentionPattern


def validate_run(run: RunConfig, origins: Origins | None = None) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: with one line for each, at the file and line where `origins` knows it.
    """
    from llada_megatron.llada_moe.objectives import make_objective  # its files import sections of the configuration

    refuse, problems = collector(origins)
    check_model(run.model, lambda key, message: refuse(f"model.{key}", message))
    problems.raise_if_any()  # what follows divides by the model's sizes
    check_objective(run.objective, run.model.moe, refuse)
    check_data(run.data, run.validation.interval, refuse)
    check_optimizer(run.optimizer, run.training.steps, refuse)
    check_layout(run.model, run.layout, refuse)
    check_batch(run.training, run.model, run.layout, refuse)
    check_pairs(run.objective, run.training.global_batch_size, refuse)
    check_reporting(run.checkpoint, run.validation, run.logging, run.output_dir, refuse)
    check_recovery(run.recovery, lambda key, message: refuse(f"recovery.{key}", message))
    problems.raise_if_any()  # what follows divides by the axes of the layout
    make_objective(run.objective, run.training).check_run(run, refuse)
    check_trained_parts(run.training, run.model, run.layout, refuse)
    check_fp8(run.training, run.model, run.layout, refuse)
    check_param_gather(run.training.fp8, run.optimizer.low_precision, run.checkpoint.load, refuse)
    problems.raise_if_any()


def check_objective(objective: ObjectiveConfig, moe: MoEConfig | None, refuse: Refuse) -> None:
    """A kind that exists, what it refuses itself, and routing by blocks that shows a token nothing it must not see."""
    from llada_megatron.llada_moe.objectives import make_objective  # its files import sections of the configuration

    try:
        learnt = make_objective(objective)
    except ConfigError as error:
        refuse("objective.kind", str(error).removeprefix("objective.kind: "))
        return
    learnt.check(refuse)
    check_noise(objective, refuse)
    check_embedding_noise(objective, refuse)
    if moe is not None and moe.expert_capacity > 0:
        check_routing_of_run(objective, learnt.pattern(step=0), moe, refuse)


def check_routing_of_run(objective: ObjectiveConfig, pattern: AttentionPattern, moe: MoEConfig, refuse: Refuse) -> None:
    """What a token is routed by is nothing that it must not see."""
    size, block = moe.routing_block_size, objective.block_size
    if block is not None and block <= 0:
        return  # refused already
    if pattern.block == 1 and block != 1:
        refuse(
            "objective.kind",
            f"{objective.kind} with model.moe.expert_capacity {moe.expert_capacity}: the experts of a token would "
            "depend on the tokens after it, which it has to predict; use diffusion, or expert_capacity 0",
        )
    elif block is not None and block % size:
        refuse(
            "objective.block_size",
            f"{block} is not a multiple of model.moe.routing_block_size {size}: tokens would be routed by tokens of "
            f"the next block, which they do not see; use {max(block // size, 1) * size}",
        )
