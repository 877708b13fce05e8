"""Which models and runs can route by blocks."""

from __future__ import annotations

from collections.abc import Callable

from llada_megatron.llada_moe.config.schema import MoEConfig, RunConfig

Refuse = Callable[[str, str], None]


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


def check_routing_of_run(run: RunConfig, refuse: Refuse) -> None:
    """What a token is routed by is nothing that it must not see."""
    moe, objective = run.model.moe, run.objective
    if moe is None or moe.expert_capacity == 0:
        return
    size, block = moe.routing_block_size, objective.block_size
    if objective.kind == "autoregressive":
        refuse(
            "objective.kind",
            f"autoregressive with model.moe.expert_capacity {moe.expert_capacity}: the experts of a token would depend "
            "on the tokens after it, which it has to predict; use diffusion, or expert_capacity 0",
        )
    elif block is not None and block > 0 and block % size:
        refuse(
            "objective.block_size",
            f"{block} is not a multiple of model.moe.routing_block_size {size}: tokens would be routed by tokens of "
            f"the next block, which they do not see; use {max(block // size, 1) * size}",
        )
