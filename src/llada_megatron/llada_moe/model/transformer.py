"""The masked diffusion Transformer: Megatron's GPTModel with attention over a pattern and a supervised-rows head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.model.attention.packed_documents import PackedBatches
from llada_megatron.llada_moe.model.context_slices import held_runs, taken
from llada_megatron.llada_moe.model.fixed_windows import FixedWindows
from llada_megatron.llada_moe.model.head import (
    DraftRows,
    Targets,
    predicted_tokens,
    selected_logits,
    supervised_loss,
)
from llada_megatron.llada_moe.model.last_batches import LastBatches
from llada_megatron.llada_moe.model.mask_noise import MaskNoise, noisy_embedding
from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern
from llada_megatron.llada_moe.model.routing import BlockRouter
from llada_megatron.llada_moe.model.spec import block_spec
from llada_megatron.llada_moe.model.windows import Windows


class SlicedRotary(RotaryEmbedding):
    """Rotary angles of what this context rank holds of the sequence (see `context_slices`; Megatron slices in another
    order), or of the positions of a pass over windows."""

    pattern: AttentionPattern = FULL
    """Who sees whom: which positions a rank holds, and whether the sequence is `[x_t ; x_0]`, whose halves have equal
    positions."""
    windows: Windows | FixedWindows | None = None
    """The windows of the pass under way; None = whole sequences."""
    _table: torch.Tensor | None = None

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """Angles `[seq / context_parallel, 1, 1, rotary_dim]`."""
        if self.windows is not None:
            if self._table is None or self._table.size(0) < self.windows.capacity:
                self._table = self.get_emb(self.windows.capacity)
            if isinstance(self.windows, FixedWindows):
                self.windows.angles = self._table
            return self._table[self.windows.positions]
        copies = self.pattern.copies
        angles = self.get_emb(max_seq_len // copies, offset)
        if copies > 1:
            angles = angles.repeat(copies, 1, 1, 1)
        group = self.cp_group
        if group is None or group.size() == 1:
            return angles
        return taken(angles, held_runs(max_seq_len, group.rank(), group.size(), self.pattern), dim=0)


class DiffusionTransformer(GPTModel):
    """Predicts the tokens of the supervised rows, each seeing what the attention pattern lets it see."""

    mask_ratio: torch.Tensor | None = None
    """`[batch]`: mask ratios of the sequences of the training pass under way, for hooks that count by them."""

    def __init__(
        self, config: TransformerConfig, *args: Any, logits_chunk_mb: int, pattern: AttentionPattern, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self._noise: MaskNoise | None = None
        if self.pre_process:
            self.embedding.register_forward_hook(self._with_noise, with_kwargs=True)
        packed_batches, numbered = PackedBatches(), LastBatches()
        for layer in self.decoder.layers:
            layer.self_attention.core_attention.packed_batches = packed_batches
            router = getattr(layer.mlp, "router", None)
            if isinstance(router, BlockRouter):
                router.numbered = numbered
        self.logits_chunk_elements = logits_chunk_mb * 2**20 // 4
        rotary = self.rotary_pos_emb
        self.rotary_pos_emb = SlicedRotary(
            kv_channels=config.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=rotary.cp_group,
        )
        self.use_pattern(pattern)

    def use_pattern(self, pattern: AttentionPattern) -> None:
        """Attend by another pattern from now on. Layers that are run again in a backward pass need the one they had:
        change it between steps only."""
        self.pattern = pattern
        self.rotary_pos_emb.pattern = pattern
        for layer in self.decoder.layers:
            layer.self_attention.core_attention.pattern = pattern
            router = getattr(layer.mlp, "router", None)
            if isinstance(router, BlockRouter):
                router.pattern = pattern

    def forward(
        self,
        inputs: torch.Tensor,
        boundaries: torch.Tensor | Windows | FixedWindows | None = None,
        targets: Targets | None = None,
        rows: torch.Tensor | None = None,
        pattern: AttentionPattern | None = None,
        noise: MaskNoise | None = None,
        drafts: DraftRows | None = None,
    ) -> torch.Tensor:
        """Run the stage's layers.

        Args:
            inputs: token ids `[batch, seq]` (read by the first stage).
            boundaries: segment boundaries (see `patterns`); None = every sequence is one segment. Or the windows of a
                pass, whose `inputs` are `[1, total]`.
            targets: return the loss of each sequence; read by the last stage, on its device.
            rows: return the logits of these rows instead, as `selected_logits` takes them.
            pattern: who attends to whom from this step on; None = as before.
            noise: what is added to the embeddings of masked tokens (read by the first stage); None = nothing.
            drafts: return the most likely tokens at these positions instead of losses, without a gradient.

        Returns:
            On the last stage `[batch]` losses, `[positions]` tokens or `[rows, vocab / tensor_parallel]` logits; before
            it the hidden states.
        """
        if pattern is not None and pattern != self.pattern:
            self.use_pattern(pattern)
        self.rotary_pos_emb.windows = boundaries if isinstance(boundaries, Windows | FixedWindows) else None
        self._noise = noise
        wanted = next((each for each in (drafts, targets) if each is not None), rows)
        return super().forward(inputs, None, boundaries, loss_mask=wanted)

    def _with_noise(
        self, embedding: torch.nn.Module, _: tuple[Any, ...], arguments: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """Hook of the embedding."""
        return (
            output if self._noise is None else noisy_embedding(embedding, self._noise, arguments["input_ids"], output)
        )

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, loss_mask: Any = None, **__: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        if isinstance(loss_mask, Targets):
            return supervised_loss(self, hidden_states, loss_mask, self.logits_chunk_elements)
        if isinstance(loss_mask, DraftRows):
            return predicted_tokens(self, hidden_states, loss_mask, self.logits_chunk_elements)
        return selected_logits(self, hidden_states, loss_mask)


def build_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    pattern: AttentionPattern = FULL,
    logits_chunk_mb: int = 256,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
) -> DiffusionTransformer:
    """Build one pipeline stage (and interleaved chunk) of the model on the current device.

    `config` is Megatron's, with the fields of `architecture_fields`; the process groups must exist. Attention begins
    with `pattern`. The output layer is Megatron's own also beside Transformer Engine, and could add its gradient to the
    buffer only with Apex's kernel: the model is given a configuration without, and its layers keep theirs.
    """
    whole = config
    if config.gradient_accumulation_fusion:
        whole = copy.copy(config)
        whole.gradient_accumulation_fusion = False
    return DiffusionTransformer(
        whole,
        block_spec(config, model.moe, vp_stage),
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
        pattern=pattern,
    )


def architecture_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that say what is computed, whatever it is spread over."""
    return {
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
        **(_moe_fields(model, model.moe) if model.moe else {}),
    }


def _moe_fields(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
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
        "add_qkv_bias": False,
    }
    if moe.shared_expert_ffn_hidden_size:
        fields["moe_shared_expert_intermediate_size"] = moe.shared_expert_ffn_hidden_size
    if moe.num_expert_groups > 1:
        fields |= {"moe_router_num_groups": moe.num_expert_groups, "moe_router_group_topk": moe.expert_groups_top_k}
    return fields
