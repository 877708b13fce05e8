"""Model FLOPs of one training step per token: what the model needs, not what the hardware happens to spend.

Conventions, printed beside every figure (`FORMULA`): a multiply-add is 2 operations; the backward pass costs twice the
forward; only matrix products count (no norm, soft-max, rotation or activation); recomputation does not count; the
experts a token does not visit do not count; the output layer counts on the supervised rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import ModelConfig

FORMULA = (
    "FLOPs/token = 6 * (layers * (2 h H d + 2 h G d) + dense_layers * 3 h f"
    " + moe_layers * (top_k * 3 h f_e + 3 h f_s + h E) + s * h V) + 12 * layers * K * H d;"
    " h hidden, H heads, G key-value heads, d head size, f / f_e / f_s dense / expert / shared width, E experts,"
    " V vocabulary, s supervised share of the rows, K keys each query sees"
    " (bidirectional: the whole sequence, counted in full; causal: (length + 1) / 2;"
    " block-causal: up to the end of its block)."
    " Matrix products only, forward + 2x backward, no recomputation."
    " With training.lora 4 in the place of 6: frozen weights have no gradient; low-rank factors are not counted."
)

DIFFUSION_SUPERVISED_SHARE = 0.5
"""Expected share of masked rows when the mask ratio is uniform on [0, 1]."""

_WEIGHT_OPERATIONS = 6  # 2 forward + 4 backward operations per weight and token
_FROZEN_OPERATIONS = 4  # without the weight's own gradient
_SCORE_OPERATIONS = 12  # q.k and p.v: 2 + 2 forward, 4 + 4 backward per key and feature
_SWIGLU_MATRICES = 3


@dataclass(frozen=True)
class TokenFlops:
    """Forward + backward operations per token of the sequence, by part (all layers together)."""

    attention_projections: float
    attention_scores: float
    dense_mlp: float
    routed_experts: float
    shared_expert: float
    router: float
    output_layer: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return float(sum(self.parts().values()))

    def parts(self) -> dict[str, float]:
        """Name of each part and its operations per token."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def causal_keys(sequence_length: int) -> float:
    """Keys that a query of a causal model sees on average: (1 + ... + L) / L."""
    return (sequence_length + 1) / 2


def block_causal_keys(length: int, block: int) -> float:
    """Keys that a query of a segment of `length` positions sees on average: all up to the end of its block."""
    blocks, rest = divmod(length, block)
    return (block * block * blocks * (blocks + 1) / 2 + rest * length) / length


def flops_per_token(
    model: ModelConfig,
    sequence_length: int,
    *,
    keys_per_query: float | None = None,
    supervised_share: float = DIFFUSION_SUPERVISED_SHARE,
    copies: int = 1,
    frozen: bool = False,
) -> TokenFlops:
    """Forward + backward FLOPs per token of the sequence (masked or not).

    `keys_per_query`: keys each query sees on average; by default the whole sequence (bidirectional attention). Use
    `causal_keys` for an autoregressive model, `block_causal_keys` for a block-causal one, or the mean segment length
    where documents are isolated.
    `supervised_share`: rows of the output layer per token of the text, at most `copies`; 1 for an autoregressive model.
    `copies`: how often a sequence holds each token of its text (`[x_t ; x_0]`: 2).
    `frozen`: whether the model's own weights have no gradients (LoRA).
    """
    if not 0.0 <= supervised_share <= copies:
        raise ValueError(f"supervised_share must lie in [0, {copies}], not {supervised_share}")
    hidden, moe = model.hidden_size, model.moe
    moe_layers = 0 if moe is None else model.num_layers - moe.leading_dense_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    reach = sequence_length if keys_per_query is None else keys_per_query

    operations = _FROZEN_OPERATIONS if frozen else _WEIGHT_OPERATIONS

    def weights(count: float) -> float:
        return float(operations * copies * count)

    def per_moe_layer(count: int) -> float:
        return weights(moe_layers * count)

    swiglu = _SWIGLU_MATRICES * hidden
    return TokenFlops(
        attention_projections=weights(model.num_layers * hidden * 2 * (queries + keys)),
        attention_scores=float(_SCORE_OPERATIONS * copies * model.num_layers * reach * queries),
        dense_mlp=weights((model.num_layers - moe_layers) * swiglu * model.ffn_hidden_size),
        routed_experts=per_moe_layer(0 if moe is None else swiglu * moe.top_k * moe.expert_ffn_hidden_size),
        shared_expert=per_moe_layer(0 if moe is None else swiglu * moe.shared_expert_ffn_hidden_size),
        router=per_moe_layer(0 if moe is None else hidden * moe.num_experts),
        output_layer=float(operations * (supervised_share * hidden * model.vocab_size)),
    )
