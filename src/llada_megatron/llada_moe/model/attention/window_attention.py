"""Attention of a pass over windows: each with the keys of its sequence, some of them kept from earlier passes."""

from __future__ import annotations

import torch

from llada_megatron.llada_moe.model.attention.per_document import attend_part, product
from llada_megatron.llada_moe.model.windows import Window, Windows


def attend_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    windows: Windows,
    block: int | None,
    layer: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend, and keep the windows' keys and values in the memory of `layer` where there is one.

    Args:
        q: `[1, heads, total, head_dim]` of all windows and their shadows.
        k: `[1, kv_heads, total, head_dim]`; `v` the same.
        windows: which positions these are, and which keys each sees.
        block: length of the blocks that see themselves whole and all before; None = all see all.
        layer: number of the layer.
        scale: of the scores; None = head_dim ** -0.5.

    Returns:
        `[1, heads, total, head_dim]`.
    """
    kept = None if windows.memory is None else windows.memory.layer(layer, k)
    if kept is not None:
        windows.keep(kept, k, v)
    parts = []
    for run in windows.runs(block):
        window, count = run.windows[0], len(run.windows)
        own = slice(run.offset, run.offset + window.width * count)
        if kept is None:
            keys, values = k[:, :, own], v[:, :, own]
        else:
            keys, values = kept[:, window.slot : window.slot + count, :, : run.keys]
        if count == 1:
            parts.append(_attend_window(q[:, :, own], keys, values, window, block, scale))
        else:
            together = q[0, :, own].unflatten(1, (count, window.width)).transpose(0, 1)
            out = product(together, keys, values, scale, attn_mask=run.mask)
            parts.append(out.transpose(0, 1).flatten(1, 2)[None])
        if window.shadows:
            shadow = slice(own.stop, own.stop + window.shadows)
            keys, values = torch.cat([keys, k[:, :, shadow]], 2), torch.cat([values, v[:, :, shadow]], 2)
            parts.append(product(q[:, :, shadow], keys, values, scale, attn_mask=shadow_mask(window, q.device)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, block: int | None, scale: float | None
) -> torch.Tensor:
    """The queries of one window `[1, heads, width, head_dim]`: those before a draft by the pattern, these over all."""
    if block is None or not window.drafted:
        return attend_part(q, k, v, window.first, block, scale)
    drafted = product(q[:, :, window.width - window.drafted :], k, v, scale)
    if window.drafted == window.width:
        return drafted
    text = window.first + window.width - window.drafted
    before = attend_part(q[:, :, : -window.drafted], k[:, :, :text], v[:, :, :text], window.first, block, scale)
    return torch.cat([before, drafted], dim=2)


def shadow_mask(window: Window, device: torch.device) -> torch.Tensor:
    """What the shadows of a window see: bool `[shadows, keys + shadows]`, false at each one's own position."""
    own = torch.arange(window.shadow_first, window.shadow_first + window.shadows, device=device)
    return own[:, None] != torch.arange(window.keys + window.shadows, device=device)
