"""The masked diffusion Transformer: Megatron's GPTModel with attention over a pattern and a supervised-rows head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.package_info import __version__ as megatron_version
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.model.head import selected_logits, supervised_loss
from llada_megatron.llada_moe.model.patterns import Kind, seen_at_once
from llada_megatron.llada_moe.model.spec import block_spec, transformer_engine_active
from llada_megatron.llada_moe.model.windows import Windows


class ContiguousRotary(RotaryEmbedding):
    """Rotary angles of this context rank's contiguous slice of the sequence (Megatron slices in zigzag order), or of
    the positions of a pass over windows."""

    windows: Windows | None = None
    """Of the pass under way; None = whole sequences."""
    _table: torch.Tensor | None = None

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Angles `[seq / context_parallel, 1, 1, rotary_dim]`."""
        if self.windows is not None:
            if self._table is None or self._table.size(0) < self.windows.capacity:
                self._table = self.get_emb(self.windows.capacity)
            return self._table[self.windows.positions]
        angles = self.get_emb(max_seq_len, offset)
        group = self.cp_group
        return angles.chunk(group.size())[group.rank()] if group is not None and group.size() > 1 else angles


class DiffusionTransformer(GPTModel):
    """Predicts the tokens of the supervised rows, each seeing what the attention pattern lets it see."""

    def __init__(self, config: TransformerConfig, *args: Any, logits_chunk_mb: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.logits_chunk_elements = logits_chunk_mb * 2**20 // 4
        rotary = self.rotary_pos_emb
        self.rotary_pos_emb = ContiguousRotary(
            kv_channels=config.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=rotary.cp_group,
        )

    def forward(
        self,
        inputs: torch.Tensor,
        boundaries: torch.Tensor | Windows | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stage's layers.

        Args:
            inputs: token ids `[batch, seq]` (read by the first stage).
            boundaries: segment boundaries (see `patterns`); None = every sequence is one segment. Or the windows of a
                pass, whose `inputs` are `[1, total]`.
            labels: `[batch, seq]`, with `weights`: return the loss of each sequence.
            weights: `[batch, seq]` float32; 0 = not supervised.
            rows: bool `[batch, seq]`: return the logits of these rows instead.

        Returns:
            On the last stage `[batch]` losses or `[rows, vocab / tensor_parallel]` logits; before it the hidden states.
        """
        selector = weights if labels is not None else rows
        self.rotary_pos_emb.windows = boundaries if isinstance(boundaries, Windows) else None
        return super().forward(inputs, None, boundaries, labels=labels, loss_mask=selector)

    def _postprocess(
        self, hidden_states: torch.Tensor, *_: Any, labels: torch.Tensor | None = None, loss_mask: Any = None, **__: Any
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if labels is None:
            return selected_logits(self, hidden_states, loss_mask)
        return supervised_loss(self, hidden_states, labels, loss_mask, self.logits_chunk_elements)


def build_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    attention: Kind,
    block_size: int | None = None,
    logits_chunk_mb: int = 256,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> DiffusionTransformer:
    """Build one pipeline stage (and interleaved chunk) of the model on the current device.

    `config` comes from `transformer_config`; the process groups must exist. `block_size`: positions, for block-causal
    attention only.
    """
    return DiffusionTransformer(
        config,
        block_spec(config, model.moe, seen_at_once(attention, block_size), vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rotary_fraction,
        rotary_base=model.rope_theta,
        parallel_output=True,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        logits_chunk_mb=logits_chunk_mb,
    )


def transformer_config(
    model: ModelConfig, layout: LayoutConfig, training: TrainingConfig | None = None
) -> TransformerConfig:
    """Megatron's configuration of `model` under `layout`; without `training`, fp32 and no recomputation."""
    dtype = torch.bfloat16 if training is not None and training.precision == "bf16" else torch.float32
    fused = transformer_engine_active()
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
        # kernels that exist with Transformer Engine only
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        **_layout_fields(layout),
        **(_moe_fields(model, model.moe, layout, fused) if model.moe else {}),
    }
    if training is not None and training.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**fields)


def _layout_fields(layout: LayoutConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "context_parallel_size": layout.context_parallel,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
        "variable_seq_lengths": False,
    }
    if layout.pipeline_chunks_per_rank > 1:
        fields |= {
            "virtual_pipeline_model_parallel_size": layout.pipeline_chunks_per_rank,
            # with two stages both neighbours are one rank, and batched messages between two ranks pair up in the wrong
            # order: the run would silently learn something else
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    return fields


def _router_loss_scale(layout: LayoutConfig) -> int:
    """Before 0.19 Megatron scales the router's losses by the tokens of one tensor and context rank instead of those of
    all of them, so that their gradient shrinks with the layout."""
    fixed = Version(megatron_version) >= Version("0.19")
    return 1 if fixed else layout.tensor_parallel * layout.context_parallel


def _moe_fields(model: ModelConfig, moe: MoEConfig, layout: LayoutConfig, grouped: bool) -> dict[str, Any]:
    scale = _router_loss_scale(layout)
    fields: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_ffn_hidden_size,
        "moe_layer_freq": [int(layer >= moe.leading_dense_layers) for layer in range(model.num_layers)],
        "moe_router_score_function": "sigmoid" if moe.score_function == "sigmoid" else "softmax",
        # the softmax over the chosen logits is the softmax over all, divided by its sum over the chosen
        "moe_router_pre_softmax": moe.score_function == "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coefficient * scale,
        "moe_z_loss_coeff": moe.z_loss_coefficient * scale or None,
        "moe_token_dispatcher_type": layout.expert_dispatcher,
        "moe_permute_fusion": False,
        "moe_grouped_gemm": grouped,
        "add_qkv_bias": False,
    }
    if moe.shared_expert_ffn_hidden_size:
        fields["moe_shared_expert_intermediate_size"] = moe.shared_expert_ffn_hidden_size
    if moe.num_expert_groups > 1:
        fields |= {"moe_router_num_groups": moe.num_expert_groups, "moe_router_group_topk": moe.expert_groups_top_k}
    return fields
