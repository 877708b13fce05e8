"""The parallel plan of a run: how its model becomes this rank's chunks, from configuration to reduced gradients."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.model.initialization import initialize_weights
from llada_megatron.llada_moe.model.patterns import Kind
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer, build_model, transformer_config
from llada_megatron.parallel import device
from llada_megatron.parallel.sharded_state import apply_factories_copy


def attention_kind(objective: ObjectiveConfig) -> Kind:
    """Causal for the autoregressive objective; for diffusion bidirectional, inside blocks if it has a block size."""
    if objective.kind == "autoregressive":
        return "causal"
    return "full" if objective.block_size is None else "block_causal"


def build_chunks(
    model: ModelConfig,
    layout: LayoutConfig,
    config: TransformerConfig,
    attention: Kind,
    block_size: int | None = None,
    logits_chunk_mb: int = 256,
) -> list[DiffusionTransformer]:
    """The interleaved chunks of this rank's pipeline stage (one without interleaving), on the device, uninitialised."""
    count = layout.pipeline_chunks_per_rank
    chunks = []
    for chunk in range(count):
        stage = chunk if count > 1 else None
        place: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
        built = build_model(
            model,
            config,
            attention=attention,
            block_size=block_size,
            logits_chunk_mb=logits_chunk_mb,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        chunks.append(built.to(device.current()) if device.cuda_available() else built)
    return chunks


def build_run_chunks(run: RunConfig) -> list[DiffusionTransformer]:
    """The chunks of a run with their initial weights, which depend on the seed alone, not on the layout."""
    config = transformer_config(run.model, run.layout, run.training)
    kind, block_size = attention_kind(run.objective), run.objective.block_size
    chunks = build_chunks(run.model, run.layout, config, kind, block_size, run.training.logits_chunk_mb)
    sharded = [
        entry
        for chunk in chunks
        for entry in nested_values(apply_factories_copy(chunk))
        if isinstance(entry, ShardedTensor)
    ]
    initialize_weights(sharded, run.training.seed, run.model.init_std, run.model.num_layers)
    _equalize_tied_embeddings(chunks)
    mark_expert_parameters(chunks, run.layout)
    return chunks


def _equalize_tied_embeddings(chunks: list[DiffusionTransformer]) -> None:
    """With tied embeddings and pipeline stages the last stage holds a copy, which no name of its own initialises."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    for chunk in chunks:
        if (
            not chunk.share_embeddings_and_output_weights
            or stages == 1
            or not (chunk.pre_process or chunk.post_process)
        ):
            continue
        weight = chunk.shared_embedding_or_output_weight()
        if chunk.post_process and not chunk.pre_process:
            weight.data.zero_()
        torch.distributed.all_reduce(weight.data, group=parallel_state.get_embedding_group())


def mark_expert_parameters(chunks: list[DiffusionTransformer], layout: LayoutConfig) -> None:
    """Make Megatron reduce and count every routed expert when the experts are spread otherwise than the dense layers.

    Without expert-tensor parallelism a routed expert is whole on its rank and Megatron takes it for a copy that only
    tensor rank 0 counts in the gradient norm; but the tensor ranks hold other experts (or, in the distributed
    optimizer, other shards). And with one expert rank it reduces expert gradients like dense ones, which leaves out the
    tensor ranks. (Releases before 0.19 clip too little in the first case and learn from a part of the tokens in the
    second.)
    """
    if layout.tensor_parallel == layout.expert_tensor_parallel:
        return
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False
                parameter.tensor_model_parallel = True


def wrap(run: RunConfig, chunks: list[DiffusionTransformer]) -> list[DistributedDataParallel]:
    """Gradient buffers and their reduction over data-parallel ranks, for the distributed optimizer."""
    config = chunks[0].config
    modules = [Float16Module(config, chunk) for chunk in chunks] if run.training.precision == "bf16" else chunks
    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,
    )
    return [
        DistributedDataParallel(config, reduction, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
