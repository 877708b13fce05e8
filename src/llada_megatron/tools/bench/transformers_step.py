"""The training step of the same model in `transformers`: the other side of `llada bench train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import ResourceError

if TYPE_CHECKING:
    from llada_megatron.tools.bench.our_step import MaskedBatch

EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

IGNORED = -100


class TransformersStep:
    """A model of `transformers` with PyTorch's fused AdamW and gradient clipping, as its users train it.

    `rows_only`: the output layer on the masked rows only, which transformers does not offer: it shows how much of a
    difference comes from there.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float, clip: float, rows_only: bool = False) -> None:
        self.model = model.train()
        self._clip, self._rows_only = clip, rows_only
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def loss(self, batch: MaskedBatch) -> torch.Tensor:
        """Mean cross-entropy of the masked positions."""
        if self._rows_only:
            hidden = self.model.model(input_ids=batch.inputs).last_hidden_state[batch.masked]
            return torch.nn.functional.cross_entropy(self.model.lm_head(hidden), batch.labels[batch.masked])
        logits = self.model(input_ids=batch.inputs).logits
        labels = batch.labels.masked_fill(~batch.masked, IGNORED)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def step(self, batch: MaskedBatch) -> float:
        """One training step; returns the loss."""
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def build_peer(model: ModelConfig, sequence_length: int, experts_implementation: str | None = None) -> torch.nn.Module:
    """LLaMA for a dense model, OLMoE for a MoE model, of the same widths, with bidirectional attention.

    OLMoE normalises queries and keys over all heads together, ours per head: the same work, a few weights more.

    Raises:
        ResourceError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ResourceError(
            "the comparison needs transformers, which is not installed; run: pip install 'llada-megatron[dev]'"
        ) from error
    transformers.logging.set_verbosity_error()
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": sequence_length,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": None,
    }
    if model.moe is None:
        config = transformers.LlamaConfig(
            **common, intermediate_size=model.ffn_hidden_size, head_dim=model.head_dim, mlp_bias=False
        )
        peer = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.OlmoeConfig(
            **common,
            intermediate_size=model.moe.expert_ffn_hidden_size,
            num_experts=model.moe.num_experts,
            num_experts_per_tok=model.moe.top_k,
            norm_topk_prob=False,
            experts_implementation=experts_implementation,
        )
        peer = transformers.OlmoeForCausalLM(config)
    for module in peer.modules():  # each attention module decides for itself when no mask is given
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return peer


def feasible_implementations(model: ModelConfig, tokens: int, free_bytes: float) -> list[str]:
    """The experts implementations worth trying: batched_mm copies an expert's weights once per token and choice."""
    if model.moe is None:
        return []
    weights = 3 * model.hidden_size * model.moe.expert_ffn_hidden_size
    copies = 2 * 4.0 * tokens * model.moe.top_k * weights  # fp32, in the forward and again in the backward pass
    return [name for name in EXPERTS_IMPLEMENTATIONS if name != "batched_mm" or copies < 0.5 * free_bytes]
