"""Configuration of LLaDA-MoE, under its published keys."""

from typing import Any

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """Defaults are those of LLaDA-MoE-7B-A1B."""

    model_type = "llada"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 8192,
        rope_theta: float = 50000.0,
        partial_rotary_factor: float = 1.0,
        rms_norm_eps: float = 1e-5,
        qk_layernorm: bool = True,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        mask_token_id: int = 156895,
        eos_token_id: int = 156892,
        pad_token_id: int = 156892,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        self.rms_norm_eps = rms_norm_eps
        self.qk_layernorm = qk_layernorm
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
