"""Megatron's Transformer layer, attention and mixture of experts, whose parts are called directly in evaluation.

Modules, parameters, their names and the path that training takes are Megatron's own. Between the modules Megatron
prepares for recomputation, offloading, CUDA graphs and caches of its own, computes the cosines of a layer twice, and
exchanges tokens even where a rank holds all experts; a pass over a few positions would spend more time on that than on
its products.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.transformer_layer import TransformerLayer

from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.experts import expert_weights
from llada_megatron.llada_moe.model.linear import unrecorded
from llada_megatron.llada_moe.model.lora import has_factors


class DirectLayer(TransformerLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, None]:
        """What Megatron's module computes.

        Args:
            hidden_states: `[seq, batch, hidden]`.
            arguments: `attention_mask` and `rotary_pos_emb` for the attention; of the others our model gives none.

        Returns:
            `[seq, batch, hidden]`, and no context.
        """
        if not unrecorded(self):
            return super().forward(hidden_states, **arguments)
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), arguments["attention_mask"], rotary_pos_emb=arguments["rotary_pos_emb"]
        )
        hidden_states = hidden_states + attended
        computed, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + computed, None


class DirectAttention(SelfAttention):
    """Projections, norms of queries and keys, rotation, core attention, projection."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, *, rotary_pos_emb: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Megatron's module computes.

        Args:
            hidden_states: `[seq, batch, hidden]`.
            attention_mask: what the core attention takes.
            rotary_pos_emb: angles `[seq, 1, 1, rotary_dim]`.
            arguments: Megatron's others, of which our model gives none.

        Returns:
            `[seq, batch, hidden]`, and no bias.
        """
        if not unrecorded(self):
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **arguments)
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        cosine, sine = rotary_table(rotary_pos_emb, query.dtype)
        out = self.core_attention(rotate(query, cosine, sine), rotate(key, cosine, sine), value, attention_mask)
        return self.linear_proj(out)


class DirectExperts(MoELayer):
    """Routed experts, and the shared one, on a rank that holds them whole; with others, Megatron exchanges tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if torch.cuda.is_available():
            for weights in expert_weights(self.experts):
                grouped.lay_out(weights)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **arguments: Any) -> tuple[torch.Tensor, None]:
        """What Megatron's module computes; `hidden_states` `[seq, batch, hidden]`."""
        if self.token_dispatcher.tp_ep_group.size() > 1 or self.shared_expert_overlap:
            # beside an overlapped shared expert the dispatcher exchanges what that one leaves to it
            return super().forward(hidden_states, *args, **arguments)
        at_once = not self.config.fp8 and grouped.usable(hidden_states, expert_weights(self.experts)[0])
        if not unrecorded(self):
            again = self.moe_layer_recompute or self.shared_experts_recompute
            if at_once and isinstance(self.experts, SequentialMLP) and not again:
                return self._trained_at_once(hidden_states), None
            return super().forward(hidden_states, *args, **arguments)
        if not (at_once or isinstance(self.experts, SequentialMLP)):
            return super().forward(hidden_states, *args, **arguments)
        compute = self._computed_at_once if at_once and not has_factors(self.experts) else self._computed_by_expert
        out = compute(hidden_states.flatten(0, 1), *self.router(hidden_states)).view_as(hidden_states)
        return out if self.shared_experts is None else out.add_(self.shared_experts(hidden_states)), None

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What Megatron's module does; `probs` and `routing_map` are `[tokens, experts]`.

        The dispatcher pads each expert's tokens for FP8 in the routing map itself, which the fused router keeps for its
        backward pass (on an H200 autograd refused it): it gets a copy.
        """
        if self.config.moe_router_padding_for_quantization:
            routing_map = routing_map.clone()
        return super().preprocess(hidden_states, probs, routing_map)

    def _trained_at_once(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Megatron's permutations around the experts, without its dispatcher: that moves tokens that are in their place
        once more, and lets the host wait for the number of each expert's tokens, which it does not need here."""
        weights, chosen = self.router(hidden_states)
        tokens, fused = hidden_states.flatten(0, 1), self.config.moe_permute_fusion
        top_k = self.config.moe_router_topk
        if fused:
            rows = tokens.size(0) * top_k
            permuted, probs, places = permute(tokens, chosen, probs=weights, num_out_tokens=rows, fused=True)[:3]
        else:  # Megatron 0.16 would wait for the number of rows, which is known
            order, probs = by_expert(weights, chosen, top_k)
            places = order // top_k
            permuted = tokens.index_select(0, places)
        computed, _ = self.experts(permuted, chosen.sum(dim=0), probs)
        out = unpermute(computed, places, restore_shape=tokens.shape, routing_map=chosen, fused=fused)
        out = out.view_as(hidden_states)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)

    def _computed_by_expert(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The experts one after the other; `weights` and `chosen` are `[tokens, experts]`."""
        weights, chosen = weights.t(), chosen.t()
        token = chosen.nonzero()[:, 1]  # by expert, as the experts take them
        computed, _ = self.experts(tokens.index_select(0, token), chosen.sum(dim=1), weights[chosen])
        return torch.zeros_like(tokens).index_add_(0, token, computed)

    def _computed_at_once(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """All experts at once, in shapes that do not depend on the choice and without waiting for it."""
        top_k = self.config.moe_router_topk
        order, probs = by_expert(weights, chosen, top_k)
        ends = grouped.ends_of(chosen.sum(dim=0), tokens.device)
        first, second = (grouped.stacked(part) for part in expert_weights(self.experts))
        computed, _ = grouped.forward(tokens.index_select(0, order // top_k), probs, ends, first, second)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return computed.index_select(0, place).view(-1, top_k, tokens.size(-1)).sum(dim=1)


def by_expert(weights: torch.Tensor, chosen: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all experts, as these take them: by expert, and of each in the order of the tokens.

    The host does not wait: of every token as many experts are chosen.

    Args:
        weights: `[tokens, experts]`.
        chosen: bool `[tokens, experts]`, `top_k` of each token.

    Returns:
        Places `[tokens * top_k]` in `[tokens, top_k]` flattened, and the weights `[tokens * top_k]` of these rows.
    """
    experts = chosen.to(torch.uint8).topk(top_k, dim=1).indices
    order = experts.flatten().argsort(stable=True)
    return order, weights.gather(1, experts).flatten().index_select(0, order)


def rotary_table(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines that are negative in the first half, of `angles` `[seq, 1, 1, rotary_dim]`."""
    sine = angles.sin()
    sine[..., : angles.size(-1) // 2].neg_()
    return angles.cos().to(dtype), sine.to(dtype)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate feature i of `x` `[seq, batch, heads, head_dim]` with feature i + rotary_dim / 2; those above stay.

    `cosine` and `sine` are those of `rotary_table`. Source: RoPE (arXiv 2104.09864), with halves instead of neighbours.
    """
    width = cosine.size(-1)
    part = x if width == x.size(-1) else x[..., :width]
    turned = (part * cosine).add_(part.roll(width // 2, -1).mul_(sine))
    return turned if width == x.size(-1) else torch.cat([turned, x[..., width:]], dim=-1)
