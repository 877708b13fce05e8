"""What the masked diffusion Transformers of this family share; imported by the modelling file beside it.

Attention is bidirectional: a token sees every other one, unless `attention_mask` says otherwise. Nothing is cached
between calls, and the logits of a position are those of its own token (labels are not shifted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.utils import can_return_tuple

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of the angles, float32 `[batch, 1, seq, rotary_dim]`."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[..., size]`."""
        exact = x.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation(positions: torch.Tensor, rotary_dim: int, theta: float) -> Rotation:
    """Angles of rotary embeddings for positions `[batch, seq]`; feature i is paired with i + rotary_dim / 2."""
    frequencies = theta ** -(torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim)
    angles = positions[:, None, :, None].float() * frequencies
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotate the first rotary_dim features of `[batch, heads, seq, head_dim]`, in float32."""
    cosine, sine = by
    turned, kept = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], dim=-1)
    first, second = turned.float().chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(x.dtype), kept], dim=-1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by: Rotation, mask: torch.Tensor | None
) -> torch.Tensor:
    """Rotary embedding and softmax attention, from heads `[batch, seq, heads, head_dim]` to `[batch, seq, features]`.

    There may be fewer key and value heads than query heads. `mask`: see `score_mask`.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    key, value = rotate(key, by).repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    out = F.scaled_dot_product_attention(rotate(query, by), key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def score_mask(attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What `scaled_dot_product_attention` takes, from what a caller gives.

    None: all see all. `[batch, seq]`: keys with 0 are padding, that nobody sees. `[batch or 1, heads or 1, seq, seq]`:
    who sees whom, as it stands; bool or integers (true = seen), or floats that are added to the scores.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, None, None, :].bool()
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; give 2 (padding) or 4 (a pattern)")
    return attention_mask.to(dtype) if attention_mask.is_floating_point() else attention_mask.bool()


def mix_experts(
    x: torch.Tensor, experts: Sequence[nn.Module], chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum of each token's chosen experts, weighted.

    Args:
        x: `[tokens, hidden]`.
        chosen: numbers of the experts `[tokens, top_k]`, with `weights` float32 of that shape.

    Returns:
        `[tokens, hidden]`.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # the tokens of an expert lie side by side
    tokens = order // chosen.shape[1]
    parts = x[tokens].split(torch.bincount(flat, minlength=len(experts)).tolist())
    everyone = torch.is_grad_enabled()  # data-parallel training waits for a gradient of every expert
    out = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True) if len(part) or everyone])
    mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return mixed.index_add_(0, tokens, out * weights.flatten()[order, None]).to(x.dtype)


class DiffusionPreTrainedModel(PreTrainedModel):
    """What transformers must know of all of them."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the labelled tokens of this call
    _supports_sdpa = True


class Backbone(DiffusionPreTrainedModel):
    """Token ids to hidden states. A subclass makes the modules and says where they are."""

    _keys_to_ignore_on_load_unexpected: ClassVar[Sequence[str]] = [r"lm_head\."]
    computes: ClassVar[Mapping[str, Any]] = {}
    """Keys of the configuration that may have this value only."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        for key, value in self.computes.items():
            if getattr(config, key, value) != value:
                raise ValueError(
                    f"config.json: {key} = {getattr(config, key)!r}; this modelling file computes {value!r}"
                )

    def stack(self) -> tuple[nn.Module, Sequence[GradientCheckpointingLayer], nn.Module]:
        """Embedding, layers, final norm."""
        raise NotImplementedError

    def rotary(self) -> tuple[int, float]:
        """Rotated features of a head, and the base of their frequencies."""
        raise NotImplementedError

    def further_inputs(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What every layer gets besides the rotation and the mask, for `[batch, seq, hidden]`."""
        return ()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> BaseModelOutput:
        """Hidden states `[batch, seq, hidden]` of `input_ids` or `inputs_embeds`; the mask: see `score_mask`."""
        embedding, layers, norm = self.stack()
        x = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(x.shape[1], device=x.device)[None] if position_ids is None else position_ids
        by, mask = rotation(positions, *self.rotary()), score_mask(attention_mask, x.dtype)
        further = self.further_inputs(x, attention_mask)
        for layer in layers:
            x = layer(x, by, mask, *further)
        return BaseModelOutput(last_hidden_state=norm(x))


class MaskedLM(DiffusionPreTrainedModel):
    """A backbone, `self.model`, and an output layer, `self.get_output_embeddings()`."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> MaskedLMOutput:
        """Logits `[batch, seq, vocab]`; with `labels` `[batch, seq]` also a loss.

        The loss is the mean cross-entropy where labels are not -100; every position predicts its own token.
        """
        hidden = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True).last_hidden_state
        logits = F.linear(hidden, self.get_output_embeddings().weight)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.set_input_embeddings(value)
