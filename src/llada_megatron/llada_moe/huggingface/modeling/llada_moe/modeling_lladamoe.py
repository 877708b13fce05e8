"""LLaDA-MoE, under the published names of classes and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_lladamoe import LLaDAConfig
from .llada_generation import FixedStepsGenerationMixin
from .llada_layers import Backbone, FeedForward, MaskedLM, RMSNorm, Rotation, attend, mix_experts


class LLaDAMoEAttention(nn.Module):
    """Attention with a norm over each query and key head, before the rotation."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_attention_heads
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.normed = config.qk_layernorm

    def forward(self, x: torch.Tensor, by: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same."""
        query, key, value = (
            part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        return self.o_proj(attend(query, key, value, by, mask))


class LLaDAMoESparseMoeBlock(nn.Module):
    """Softmax over all experts in float32, then the best; their weights do not add up to 1."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(config.hidden_size, config.expert_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same."""
        tokens = x.flatten(0, 1)
        scores = F.linear(tokens.float(), self.gate.weight.float()).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        return mix_experts(tokens, self.experts, chosen, weights).view_as(x)


class LLaDAMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LLaDAMoEAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LLaDAMoESparseMoeBlock(config)

    def forward(self, x: torch.Tensor, by: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), by, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDAMoEModel(Backbone):
    """Embedding, layers and final norm."""

    config_class = LLaDAConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDAMoEDecoderLayer"]
    computes: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "shared_expert_intermediate_size": None,
        "rope_scaling": None,
    }

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDAMoEDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def stack(self) -> tuple[nn.Module, Sequence[LLaDAMoEDecoderLayer], nn.Module]:
        """Embedding, layers, final norm."""
        return self.embed_tokens, self.layers, self.norm

    def rotary(self) -> tuple[int, float]:
        """The first `partial_rotary_factor` of a head's features."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return int(head_dim * self.config.partial_rotary_factor), self.config.rope_theta

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.embed_tokens = value


class LLaDAMoEModelLM(FixedStepsGenerationMixin, MaskedLM):
    """LLaDA-MoE with its output layer."""

    config_class = LLaDAConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDAMoEDecoderLayer"]
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.lm_head = value
