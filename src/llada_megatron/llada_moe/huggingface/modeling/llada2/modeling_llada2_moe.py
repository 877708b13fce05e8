"""LLaDA2.0, 2.1 and 2.2, under the published names of classes and weights.

The released models were finished with block-causal attention, blocks of 32 positions: give `block_causal_mask` as
`attention_mask` for what they were trained on. Without a mask attention is full in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_llada2_moe import LLaDA2MoeConfig
from .llada_generation import ThresholdGenerationMixin
from .llada_layers import Backbone, FeedForward, MaskedLM, RMSNorm, Rotation, attend, mix_experts


def block_causal_mask(
    length: int,
    block_size: int = 32,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Attention mask `[1, 1, length, length]`: a position sees its own block and the blocks before it.

    bool: true = seen; a floating-point dtype: 0 = seen, -inf = not, to be added to the scores.
    """
    block = torch.arange(length, device=device) // block_size
    seen = (block[:, None] >= block[None, :])[None, None]
    if dtype is torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))


def routing_blocks(rows: int, length: int, block_size: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Numbers of the blocks `[rows, length]` whose tokens choose experts together, counted from each row's first token.

    A 2-D `attention_mask` says what is padding; all padding is one block of its own.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        real = torch.ones(rows, length, dtype=torch.bool)
    else:
        real = attention_mask.bool()
    of_a_row = -(-length // block_size)
    block = (real.cumsum(1) - 1) // block_size + torch.arange(rows, device=real.device)[:, None] * of_a_row
    return block.masked_fill(~real, rows * of_a_row)


class LLaDA2MoeAttention(nn.Module):
    """Attention from one projection, with a norm over each query and key head before the rotation."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, by: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same."""
        query, key, value = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        return self.dense(attend(self.query_layernorm(query), self.key_layernorm(key), value, by, mask))


class LLaDA2MoeGate(nn.Linear):
    """Sigmoid scores in float32; the bias takes part in the choice of experts, not in their weights."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.config = config
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.register_buffer("expert_bias", bias if config.moe_router_enable_expert_bias else None)

    def forward(self, x: torch.Tensor, blocks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the chosen experts and their weights, both `[tokens, top_k]`, for `[tokens, hidden]`.

        `blocks`: see `routing_blocks`, `[tokens]`; None = each token chooses for itself, among the best groups.
        """
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ranked = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        ranked = self._in_groups(ranked) if blocks is None else self._in_blocks(ranked, blocks)
        chosen = ranked.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.config.routed_scaling_factor

    def _in_groups(self, ranked: torch.Tensor) -> torch.Tensor:
        """-inf outside the groups with the highest sum of their two best."""
        groups = ranked.unflatten(-1, (self.config.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        return groups.masked_fill(outside[..., None], float("-inf")).flatten(-2)

    def _in_blocks(self, ranked: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """-inf outside the experts that any token of the block ranks highest."""
        best = ranked.new_full((int(blocks.max()) + 1, ranked.shape[1]), float("-inf"))
        best.scatter_reduce_(0, blocks[:, None].expand_as(ranked), ranked, "amax")
        chosen = best.topk(self.config.expert_capacity, dim=-1).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
        return ranked.masked_fill(outside[blocks], float("-inf"))


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """The chosen experts, and a shared one for every token."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = LLaDA2MoeGate(config)
        self.experts = nn.ModuleList(FeedForward(hidden, width) for _ in range(config.num_experts))
        self.shared_experts = (
            FeedForward(hidden, width * config.num_shared_experts) if config.num_shared_experts else None
        )

    def forward(self, x: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same; `blocks`: see `routing_blocks`."""
        tokens = x.flatten(0, 1)
        routed = mix_experts(tokens, self.experts, *self.gate(tokens, blocks)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts; a dense feed-forward in the first layers."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LLaDA2MoeAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            FeedForward(config.hidden_size, config.intermediate_size) if dense else LLaDA2MoeSparseMoeBlock(config)
        )

    def forward(
        self, x: torch.Tensor, by: Rotation, mask: torch.Tensor | None, blocks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same; `blocks`: see `routing_blocks`."""
        x = x + self.attention(self.input_layernorm(x), by, mask)
        inner = self.post_attention_layernorm(x)
        return x + (self.mlp(inner) if isinstance(self.mlp, FeedForward) else self.mlp(inner, blocks))


class LLaDA2MoeModel(Backbone):
    """Embedding, layers and final norm."""

    config_class = LLaDA2MoeConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDA2MoeDecoderLayer"]
    computes: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "rope_scaling": None,
    }

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()
        keep_expert_bias(self)

    def stack(self) -> tuple[nn.Module, Sequence[LLaDA2MoeDecoderLayer], nn.Module]:
        """Embedding, layers, final norm."""
        return self.word_embeddings, self.layers, self.norm

    def further_inputs(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Where tokens choose experts by blocks, the block of each, `[tokens]`."""
        if not self.config.expert_capacity:
            return ()
        return (routing_blocks(*x.shape[:2], self.config.block_size, attention_mask).flatten().to(x.device),)

    def rotary(self) -> tuple[int, float]:
        """The first `partial_rotary_factor` of a head's features."""
        return int(self.config.head_dim * self.config.partial_rotary_factor), self.config.rope_theta

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.word_embeddings = value


class LLaDA2MoeModelLM(ThresholdGenerationMixin, MaskedLM):
    """LLaDA2 with its output layer."""

    config_class = LLaDA2MoeConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDA2MoeDecoderLayer"]
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.word_embeddings.weight"}

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        keep_expert_bias(self)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.lm_head = value


def keep_expert_bias(model: LLaDA2MoeModel | LLaDA2MoeModelLM) -> None:
    """Load the expert bias in float32 whatever the dtype of the weights.

    Set once `post_init` is over: transformers 4 looks for such a name among the parameters, and it is a buffer.
    """
    model._keep_in_fp32_modules_strict = {"expert_bias"}
