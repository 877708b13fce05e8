"""The parallel plan of a run, from top to bottom: how its model becomes this rank's chunks.

1. `transformer_config`: what Megatron is told of the model, the precision, the layout and the kernels.
2. `build_chunks`: the stages and interleaved chunks of this rank, on its device, without weights.
3. `build_run_chunks`: initial weights, equal under every layout, and which gradients are reduced over which ranks.
4. `wrap`: mixed precision, gradient buffers and their reduction.

The groups of ranks themselves are made by `topology`, the optimizer's shards by `training.distributed_optimizer`.
`sharded_state` says what the shards are called in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.package_info import __version__ as megatron_version
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import fused_a2a, moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig, adapts_experts, is_trained, trains
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model import grouped, lora
from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.llada_moe.model.experts import PermutedExperts, expert_weights
from llada_megatron.llada_moe.model.initialization import initialize_weights
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer, architecture_fields, build_model
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel import device
from llada_megatron.parallel.fp8 import fp8_state, fp8_weights, recipes
from llada_megatron.parallel.fusions import fusion_fields
from llada_megatron.parallel.overlap import connect
from llada_megatron.parallel.sharded_state import apply_factories_copy
from llada_megatron.parallel.topology import release_at_leave


def transformer_config(
    model: ModelConfig, layout: LayoutConfig, training: TrainingConfig | None = None
) -> TransformerConfig:
    """Megatron's configuration of `model` under `layout`; without `training`, fp32 and no recomputation."""
    dtype = torch.bfloat16 if training is not None and training.precision == "bf16" else torch.float32
    fields: dict[str, Any] = {
        **architecture_fields(model),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
        **fusion_fields(model, training is not None, dtype, fp8=training is not None and training.fp8 is not None),
        **_layout_fields(layout),
        **(_expert_layout_fields(model.moe, layout) if model.moe else {}),
        **recipes.transformer_fields(training.fp8 if training is not None else None, model.moe is not None),
    }
    if training is not None:
        fields |= _trained_fields(model, training)
        fields |= _recompute_fields(training, keeps_activations=fields.get("moe_grouped_gemm", False))
    return TransformerConfig(**fields)


def _trained_fields(model: ModelConfig, training: TrainingConfig) -> dict[str, Any]:
    """A router that is not trained keeps its expert biases too. Experts with factors are our own also where those of
    Transformer Engine would serve."""
    fields: dict[str, Any] = {}
    if model.moe is not None and not trains(training, "router"):
        fields["moe_router_bias_update_rate"] = 0.0
    if adapts_experts(training):
        fields["moe_grouped_gemm"] = False
    return fields


def _recompute_fields(training: TrainingConfig, keeps_activations: bool) -> dict[str, Any]:
    """What is run again in the backward pass. Our own experts never keep their activations, so that `moe_act` is for
    Transformer Engine's only (Megatron refuses it for others): `keeps_activations` says whether the model has those."""
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if "layernorm" in training.recompute_modules and not transformer_engine_active():
        raise ConfigError(
            "training.recompute_modules: layernorm needs Transformer Engine (Megatron asks it about FP8 before it runs "
            "a norm again), which this process does not use; leave it out"
        )
    modules = [part for part in training.recompute_modules if part != "moe_act" or keeps_activations]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def _layout_fields(layout: LayoutConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "context_parallel_size": layout.context_parallel,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
        "variable_seq_lengths": False,
        # the host waits for the device after every exchange between stages, against an error of torch before 2.0
        "batch_p2p_sync": False,
    }
    if layout.pipeline_chunks_per_rank > 1:
        fields |= {
            "virtual_pipeline_model_parallel_size": layout.pipeline_chunks_per_rank,
            # with two stages both neighbours are one rank, and batched messages between two ranks pair up in the wrong
            # order: the run would silently learn something else
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if layout.pipeline_layers is not None:
        chunks = [["decoder"] * count for count in layout.pipeline_layers]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = chunks
    return fields


def _expert_layout_fields(moe: MoEConfig, layout: LayoutConfig) -> dict[str, Any]:
    scale = _router_loss_scale(layout)
    if layout.expert_dispatcher == "flex":
        _require_flex(layout.flex_backend)
    return {
        "moe_aux_loss_coeff": moe.aux_loss_coefficient * scale,
        "moe_z_loss_coeff": moe.z_loss_coefficient * scale or None,
        "moe_token_dispatcher_type": layout.expert_dispatcher,
        "moe_flex_dispatcher_backend": layout.flex_backend,
        "moe_shared_expert_overlap": layout.overlap_shared_experts,
    }


def _require_flex(backend: str) -> None:
    """Refuse the flex dispatcher where its kernels are missing. Raises ConfigError."""
    if not device.cuda_available():
        raise ConfigError(
            "layout.expert_dispatcher: flex needs GPUs (its kernels write into their memory); use alltoall"
        )
    found = {"deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
    if not found[backend]:
        wanted = "deep_ep" if backend == "deepep" else "deep_ep with HybridEPBuffer (its branch hybrid-ep)"
        raise ConfigError(
            f"layout.expert_dispatcher: flex with flex_backend {backend} needs the Python package {wanted}, which "
            "cannot be imported here; install it (https://github.com/deepseek-ai/DeepEP), or use alltoall"
        )


def _router_loss_scale(layout: LayoutConfig) -> int:
    """Before 0.19 Megatron scales the router's losses by the tokens of one tensor and context rank instead of those of
    all of them, so that their gradient shrinks with the layout."""
    fixed = Version(megatron_version) >= Version("0.19")
    return 1 if fixed else layout.tensor_parallel * layout.context_parallel


def default_logits_chunk_mb() -> int:
    """Memory of the fp32 logits that exist at a time. A GPU is busy with thousands of rows only, and each chunk reads
    and writes the gradient of the whole output layer once."""
    return 2048 if device.cuda_available() else 256


def build_chunks(
    model: ModelConfig,
    layout: LayoutConfig,
    config: TransformerConfig,
    pattern: AttentionPattern,
    logits_chunk_mb: int | None = None,
    factors: LoRAConfig | None = None,
) -> list[DiffusionTransformer]:
    """The interleaved chunks of this rank's pipeline stage (one without interleaving), on the device, uninitialised.

    `logits_chunk_mb`: None = as many as suit the device. `factors`: which layers have low-rank factors; None = none.
    """
    if config.fp8:
        recipes.adapt_delayed_scaling()
    count = layout.pipeline_chunks_per_rank
    chunks = []
    for chunk in range(count):
        stage = chunk if count > 1 else None
        place: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
        built = build_model(
            model,
            config,
            pattern=pattern,
            logits_chunk_mb=default_logits_chunk_mb() if logits_chunk_mb is None else logits_chunk_mb,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        if factors is not None:
            lora.adapt(built, factors)
        chunks.append(built.to(device.current()) if device.cuda_available() else built)
    return chunks


def build_run_chunks(
    run: RunConfig, initialize: Callable[[list[ShardedTensor], int, float, int], None] = initialize_weights
) -> list[DiffusionTransformer]:
    """The chunks of a run with their initial weights, which depend on the seed alone, not on the layout.

    `initialize`: draws them instead, as `initialize_weights` is called; where their values do not matter.
    """
    _forget_router_losses()
    config = transformer_config(run.model, run.layout, run.training)
    pattern = make_objective(run.objective, run.training).pattern(step=0)
    chunks = build_chunks(run.model, run.layout, config, pattern, run.training.logits_chunk_mb, run.training.lora)
    with fp8_weights.initialising(chunks):
        sharded = [
            tensor
            for chunk in chunks
            for tensor in nested_values(apply_factories_copy(chunk))
            if isinstance(tensor, ShardedTensor)
        ]
        initialize(sharded, run.training.seed, run.model.init_std, run.model.num_layers)
    _equalize_tied_embeddings(chunks)
    fp8_state.prepare(chunks)
    mark_expert_parameters(chunks, run.layout)
    freeze(chunks, run.training)
    return chunks


def freeze(chunks: list[DiffusionTransformer], training: TrainingConfig) -> None:
    """Leave out of training what the run does not train. Megatron makes neither gradients nor optimizer state of it."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            tied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            # of a tied embedding the last of several stages has a copy by that name
            trained = trains(training, "embedding") if tied else is_trained(training, name)
            if not trained:
                parameter.requires_grad_(False)
        if chunk.pre_process and not trains(training, "embedding"):
            chunk.embedding.register_forward_hook(_with_gradients)


def _with_gradients(embedding: torch.nn.Module, _: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Hook of a frozen embedding: a part that is run again in the backward pass, and a pipeline stage, give gradients
    to their weights only where their input has one."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _forget_router_losses() -> None:
    """Megatron notes the routers' losses of a process in tensors as long as its first model has layers."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # before megatron-core 0.19
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


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
        grad_reduce_in_fp32=run.optimizer.main_grads_dtype == "fp32",
        overlap_grad_reduce=run.layout.overlap_grad_reduce,
        overlap_param_gather=run.layout.overlap_param_gather,
        check_for_nan_in_grad=False,
        **recipes.reduction_fields(run.training.fp8),
    )
    wrapped = [
        DistributedDataParallel(config, reduction, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    release_at_leave(wrapped)
    connect(wrapped)
    add_to_main_gradients(chunks, awaited=run.layout.overlap_grad_reduce)
    return wrapped


def add_to_main_gradients(chunks: list[DiffusionTransformer], awaited: bool) -> None:
    """Let experts whose gradients lie side by side in the buffer add to it themselves (see `PermutedExperts`).

    `awaited`: hooks begin the reduction of a bucket when each of its parameters has got a gradient.
    """
    for experts in (module for chunk in chunks for module in chunk.modules() if isinstance(module, PermutedExperts)):
        first, second = expert_weights(experts)
        if not all(weight.requires_grad for weight in (*first, *second)):
            continue
        places = [grouped.view_of([weight.main_grad for weight in weights]) for weights in (first, second)]
        if places[0] is not None and places[1] is not None:
            experts.main_gradients = grouped.MainGradients(*places, (*first, *second) if awaited else ())
