"""Dense LLaDA, under the published names of classes and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_llada import LLaDAConfig
from .llada_generation import FixedStepsGenerationMixin
from .llada_layers import Backbone, MaskedLM, RMSNorm, Rotation, attend


class LLaDABlock(GradientCheckpointingLayer):
    """Attention and SwiGLU: `ff_proj` is its gate, `ff_out` its way down."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        hidden, width = config.d_model, config.mlp_hidden_size
        self.head_dim = hidden // config.n_heads
        keys = config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.ff_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.ff_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.ff_out = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor, by: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same."""
        normed = self.attn_norm(x)
        heads = (part(normed).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.attn_out(attend(*heads, by, mask))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDAModel(Backbone):
    """Embedding, blocks, final norm and, with untied embeddings, the output layer."""

    config_class = LLaDAConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDABlock"]
    computes: ClassVar[Mapping[str, Any]] = {
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "scale_logits": False,
        "input_emb_norm": False,
    }

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        modules: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            modules["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(modules)
        self.post_init()

    def stack(self) -> tuple[nn.Module, Sequence[LLaDABlock], nn.Module]:
        """Embedding, layers, final norm."""
        return self.transformer["wte"], self.transformer["blocks"], self.transformer["ln_f"]

    def rotary(self) -> tuple[int, float]:
        """All features of a head."""
        return self.config.d_model // self.config.n_heads, self.config.rope_theta

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.transformer["wte"] = value


class LLaDAModelLM(FixedStepsGenerationMixin, MaskedLM):
    """LLaDA with its output layer."""

    config_class = LLaDAConfig
    _no_split_modules: ClassVar[Sequence[str]] = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer; with tied embeddings their table."""
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = value
