"""The parallel layouts that `llada bench parity` and the tests compare with one process, and their runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.objectives import config_class

DENSE = ModelConfig(
    family="llada",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_sequence_length=64,
    mask_token_id=127,
    eos_token_id=126,
)
TIED = dataclasses.replace(DENSE, tie_embeddings=True)
SOFTMAX = dataclasses.replace(
    DENSE,
    family="llada_moe",
    qk_norm=True,
    moe=MoEConfig(
        num_experts=8, top_k=2, expert_ffn_hidden_size=32, aux_loss_coefficient=0.01, z_loss_coefficient=0.001
    ),
)
SIGMOID = dataclasses.replace(
    DENSE,
    family="llada2",
    qk_norm=True,
    rotary_fraction=0.5,
    moe=MoEConfig(
        num_experts=8,
        top_k=4,
        expert_ffn_hidden_size=32,
        shared_expert_ffn_hidden_size=32,
        leading_dense_layers=1,
        score_function="sigmoid",
        expert_bias=True,
        expert_bias_update_rate=0.001,
        num_expert_groups=4,
        expert_groups_top_k=2,
        routed_scaling_factor=2.5,
    ),
)
BLOCKS = dataclasses.replace(
    SIGMOID,
    moe=dataclasses.replace(
        SIGMOID.moe, num_expert_groups=1, expert_groups_top_k=1, top_k=2, expert_capacity=3, routing_block_size=5
    ),
)
"""Routed by blocks that no rank's share of the sequence holds whole."""
EDITING = EditingConfig(share=0.8, replace_ratio=0.3, missing_ratio=0.1, surplus_ratio=0.1, draft_share=0.4)
"""All that may be wrong beside masks."""


def with_operations(model: ModelConfig) -> ModelConfig:
    """The model with ids to delete and to insert."""
    return dataclasses.replace(model, delete_token_id=125, insert_token_id=124)


MODELS = {"dense": DENSE, "tied": TIED, "softmax": SOFTMAX, "sigmoid": SIGMOID, "blocks": BLOCKS}


def _layout(**sizes: object) -> LayoutConfig:
    return LayoutConfig(**sizes)  # type: ignore[arg-type]


DENSE_LAYOUTS = {
    "TP2": _layout(tensor_parallel=2),
    "TP2.SP": _layout(tensor_parallel=2, sequence_parallel=True),
    "TP4.SP": _layout(tensor_parallel=4, sequence_parallel=True),
    "PP2": _layout(pipeline_parallel=2),
    "PP4": _layout(pipeline_parallel=4),
    "PP2 interleaved": _layout(pipeline_parallel=2, pipeline_chunks_per_rank=2),
    "PP2 uneven": _layout(pipeline_parallel=2, pipeline_layers=[3, 1]),
    "CP2": _layout(context_parallel=2),
    "CP4": _layout(context_parallel=4),
    "DP2": _layout(data_parallel=2),
    "DP4": _layout(data_parallel=4),
    "TP2.SP.PP2": _layout(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2),
    "TP2.SP.CP2": _layout(tensor_parallel=2, sequence_parallel=True, context_parallel=2),
    "TP2.DP2": _layout(tensor_parallel=2, data_parallel=2),
    "PP2.CP2": _layout(pipeline_parallel=2, context_parallel=2),
    "PP2.DP2": _layout(pipeline_parallel=2, data_parallel=2),
    "CP2.DP2": _layout(context_parallel=2, data_parallel=2),
}
MOE_LAYOUTS = {
    "EP2": _layout(data_parallel=2, expert_parallel=2),
    "EP2 allgather": _layout(data_parallel=2, expert_parallel=2, expert_dispatcher="allgather"),
    "EP4": _layout(data_parallel=4, expert_parallel=4),
    "DP4.EP2": _layout(data_parallel=4, expert_parallel=2),
    "TP2.SP": _layout(tensor_parallel=2, sequence_parallel=True),
    "TP2.SP.EP2": _layout(tensor_parallel=2, sequence_parallel=True, expert_parallel=2),
    "TP2.SP.ETP2": _layout(tensor_parallel=2, sequence_parallel=True, expert_tensor_parallel=2),
    "EP2.ETP2": _layout(
        tensor_parallel=2, sequence_parallel=True, data_parallel=2, expert_parallel=2, expert_tensor_parallel=2
    ),
    "EP2.ETP2 allgather": _layout(
        tensor_parallel=2,
        sequence_parallel=True,
        data_parallel=2,
        expert_parallel=2,
        expert_tensor_parallel=2,
        expert_dispatcher="allgather",
    ),
    "PP2": _layout(pipeline_parallel=2),
    "PP2 interleaved": _layout(pipeline_parallel=2, pipeline_chunks_per_rank=2),
    "CP2": _layout(context_parallel=2),
    "TP2.SP.CP2": _layout(tensor_parallel=2, sequence_parallel=True, context_parallel=2),
    "CP2.EP2": _layout(context_parallel=2, expert_parallel=2),
    "PP2.EP2": _layout(pipeline_parallel=2, data_parallel=2, expert_parallel=2),
    "PP2.EP2 uneven": _layout(pipeline_parallel=2, pipeline_layers=[3, 1], data_parallel=2, expert_parallel=2),
    "TP2.SP.PP2.EP2": _layout(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2, expert_parallel=2),
}


def parity_run(
    model: ModelConfig,
    layout: LayoutConfig,
    *,
    objective: str = "diffusion",
    block_size: int | None = None,
    replace_ratio: float = 0.0,
    editing: EditingConfig | None = None,
    recompute: str = "none",
    **training: object,
) -> RunConfig:
    """A small run of `model` under `layout`; the same loss and gradients as under any other.

    `editing`: for block diffusion only.
    """
    own = {} if editing is None else {"editing": editing}
    return RunConfig(
        model=model,
        objective=config_class(objective)(
            kind=objective,
            block_size=block_size,
            random_length_probability=0.25,
            replace_ratio=replace_ratio,
            **own,
        ),
        training=TrainingConfig(
            **{
                "steps": 8,
                "sequence_length": 32,
                "global_batch_size": 8,
                "seed": 5,
                "precision": "fp32",
                "recompute": recompute,
                **training,
            }  # type: ignore[arg-type]
        ),
        data=DataConfig(sets=[DataSetConfig(path=str(Path("synthetic")))]),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2)),
        layout=layout,
        output_dir="unused",
    )
