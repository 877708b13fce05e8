"""All experts of a rank in one product each, without the host knowing how many tokens each has.

`torch.nn.functional.grouped_mm` multiplies every expert's rows with that expert's matrix; where the rows of one expert
end is a tensor on the GPU, so nothing waits for it and a CUDA graph can hold it. It wants the matrices as one
`[experts, out, in]`. Parameters stay one per expert, as checkpoints and optimizers know them; they are laid out so that
this tensor is a view of them (`lay_out`, and `RegisteredBackwards` for Megatron's own buffers).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from llada_megatron.llada_moe.model.compiled import for_any_rows

_silu_backward = torch.ops.aten.silu_backward
GROUPED_MM: Callable[..., torch.Tensor] | None = getattr(
    torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
"""torch's grouped product, public since 2.10; None = this torch has none."""
ALIGNMENT = 8
"""Rows must begin at multiples of 16 bytes: widths at multiples of 8 in bfloat16."""
_everywhere = False


def usable(x: torch.Tensor, first: Sequence[torch.Tensor]) -> bool:
    """Whether experts with the first matrices `[2 * ffn, hidden]` compute `x` `[..., hidden]` in grouped products."""
    if _everywhere:
        return True
    ffn, hidden = first[0].size(0) // 2, first[0].size(1)
    plain = all(weight.dtype is x.dtype and not _quantized(weight) for weight in first)
    return x.is_cuda and plain and _in_one_call(x.dtype, ffn, hidden)


def serves(dtype: torch.dtype, ffn: int) -> bool:
    """Whether a GPU computes experts of this width in grouped products (the width of the model is a multiple of 8)."""
    return _in_one_call(dtype, ffn)


@functools.cache
def _has_kernel() -> bool:
    """Whether the GPU has the kernel; on others torch walks over the groups and waits for the device (pytorch issue
    186620), and before 2.10 refuses. Yes without a GPU, for tensors without data."""
    if not torch.cuda.is_available() or not torch.cuda.device_count():
        return True
    major = torch.cuda.get_device_capability()[0]
    return major == 9 or (major > 9 and hasattr(torch.nn.functional, "grouped_mm"))


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """Take grouped products on every device and in every precision: for tests of what a GPU runs."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def ends_of(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where the rows of each expert end, int32 `[experts]`, from how many there are `[experts]`."""
    return counts.to(device, non_blocking=True).cumsum(0, dtype=torch.int32)


def grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Group by group: rows of `a` `[rows, k]` times `b` `[groups, k, n]`, giving `[rows, n]`; or columns of `a`
    `[m, rows]` times rows of `b` `[rows, n]`, giving `[groups, m, n]`, zero for a group without rows.

    Args:
        ends: int32 `[groups]`, where the rows of each group end; the last is their number.
    """
    if a.numel() == 0:  # no kernel for a rank that got no token
        return a.new_zeros(*((ends.numel(), a.size(0)) if b.dim() == 2 else a.shape[:1]), b.size(-1))
    if _in_one_call(a.dtype, *((a.size(0), b.size(1)) if b.dim() == 2 else b.shape[1:])):
        product = GROUPED_MM(a, b, offs=ends)  # type: ignore[misc]
        return product if b.dim() == 3 else _zero_without_rows(product, ends)
    rows = [slice(start, end) for start, end in zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)]
    if b.dim() == 2:
        return torch.stack([a[:, part] @ b[part] for part in rows])
    return torch.cat([a[part] @ matrix for part, matrix in zip(rows, b, strict=True)])


def _zero_without_rows(product: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """A group without rows leaves its place as it was allocated on Blackwell (pytorch issue 172439); torch's own tests
    leave that case out."""
    return product.masked_fill_(_without_rows(ends)[:, None, None], 0)


def _without_rows(ends: torch.Tensor) -> torch.Tensor:
    """Which groups have no rows, bool `[groups]`."""
    return ends.diff(prepend=ends.new_zeros(1)) == 0


def _in_one_call(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch has one kernel for it."""
    return (
        GROUPED_MM is not None
        and _has_kernel()
        and dtype is torch.bfloat16
        and all(width % ALIGNMENT == 0 for width in widths)
    )


def forward(
    x: torch.Tensor, probs: torch.Tensor, ends: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[e] = (silu(x[e] G_e^T) * (x[e] U_e^T) * p[e]) D_e^T for the rows of each expert e; first = [G; U].

    Args:
        x: `[tokens, hidden]`, sorted by expert.
        probs: `[tokens]`.
        first: `[experts, 2 * ffn, hidden]`.
        second: `[experts, hidden, ffn]`.

    Returns:
        `[tokens, hidden]`, and the products before the activation `[tokens, 2 * ffn]`.
    """
    both = grouped_product(x, first.transpose(1, 2), ends)
    return grouped_product(_activated(both, probs), second.transpose(1, 2), ends), both


def _activated(both: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * p `[tokens, ffn]`, both = [gate, up]."""
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up * probs.unsqueeze(-1).to(both.dtype)


def _activation_gradients(
    both: torch.Tensor, probs: torch.Tensor, d_scaled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_activated` once more, and from its gradient `d_scaled` `[tokens, ffn]` those of `both` and `probs`."""
    gate, up = both.chunk(2, dim=-1)
    scale = probs.unsqueeze(-1).to(both.dtype)
    active = silu(gate)
    product = active * up
    d_probs = torch.sum(d_scaled * product, dim=-1, dtype=probs.dtype)
    d_product = d_scaled * scale
    d_both = torch.cat([_silu_backward(d_product * up, gate), d_product * active], dim=-1)
    return product * scale, d_both, d_probs


def _add_to(main: torch.Tensor, product: torch.Tensor, empty: torch.Tensor) -> None:
    """Add the products `[experts, out, in]` of the experts that are not `empty` `[experts]`."""
    main.add_(product.masked_fill(empty[:, None, None], 0))


@dataclass(frozen=True)
class MainGradients:
    """Places in Megatron's gradient buffer that the gradients of all experts are added to, in one operation each.

    Attributes:
        first: of the first matrices, `[experts, 2 * ffn, hidden]`.
        second: of the second ones, `[experts, hidden, ffn]`.
        awaited: the parameters, where hooks wait for the gradient of each to begin its reduction.
    """

    first: torch.Tensor
    second: torch.Tensor
    awaited: tuple[torch.nn.Parameter, ...] = ()

    def for_autograd(self, weights: int) -> Sequence[torch.Tensor | None]:
        """What autograd gets instead: nothing, or for the hooks tensors that hold nothing, which Megatron does not add
        where `grad_added_to_main_grad` says that there is no more to be added."""
        if not self.awaited:
            return [None] * weights
        for parameter in self.awaited:
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        dtype = self.awaited[0].dtype
        return [part for main in (self.first, self.second) for part in torch.empty_like(main, dtype=dtype).unbind()]


class GroupedExperts(torch.autograd.Function):
    """`forward`, and its gradients as grouped products too; the weights come one by one, first those of `first`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        probs: torch.Tensor,
        ends: torch.Tensor,
        main_gradients: MainGradients | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """`main_gradients`: None = the gradients of the weights are given to autograd."""
        ctx.main_gradients = main_gradients
        first, second = _halves(weights)
        both = grouped_product(x, first.transpose(1, 2), ends)
        scaled = for_any_rows(_activated, x.device.type)(both, probs)
        ctx.save_for_backward(x, probs, ends, both, *weights)
        return grouped_product(scaled, second.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probs, ends, both, *weights = ctx.saved_tensors
        first, second = _halves(weights)
        dy = dy.contiguous()
        d_scaled = grouped_product(dy, second, ends)
        gradients = for_any_rows(_activation_gradients, x.device.type)
        scaled, d_both, d_probs = gradients(both, probs, d_scaled)
        dx = grouped_product(d_both, first, ends)
        if ctx.main_gradients is not None:
            _accumulate(ctx.main_gradients.first, d_both, x, ends)
            _accumulate(ctx.main_gradients.second, dy, scaled, ends)
            return dx, d_probs, None, None, *ctx.main_gradients.for_autograd(len(weights))
        d_first, d_second = grouped_product(d_both.t(), x, ends), grouped_product(dy.t(), scaled, ends)
        return dx, d_probs, None, None, *d_first.unbind(), *d_second.unbind()


def _accumulate(main: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> None:
    """Add the gradient of every expert's matrix, dy[e]^T x[e], to its place in `main` `[experts, out, in]`."""
    if x.numel() == 0 or not _in_one_call(x.dtype, dy.size(1), x.size(1)):
        main.add_(grouped_product(dy.t(), x, ends))
        return
    product = GROUPED_MM(dy.t(), x, offs=ends)  # type: ignore[misc]
    for_any_rows(_add_to, x.device.type)(main, product, _without_rows(ends))


def _halves(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    half = len(weights) // 2
    return stacked(weights[:half]), stacked(weights[half:])


# --- parameters in memory --------------------------------------------------------------------------------------------


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices `[out, in]` as one `[experts, out, in]`: a view where they lie at equal distances in one storage, else a
    copy."""
    view = view_of(weights)
    return torch.stack([weight.detach() for weight in weights]) if view is None else view


def view_of(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Matrices `[out, in]` that lie at equal distances in one storage as one `[experts, out, in]`; None = do not."""
    first = weights[0].detach()
    distance = weights[1].storage_offset() - first.storage_offset() if len(weights) > 1 else first.numel()
    at_equal_distances = all(
        weight.untyped_storage()._cdata == first.untyped_storage()._cdata
        and weight.storage_offset() == first.storage_offset() + index * distance
        and weight.is_contiguous()
        for index, weight in enumerate(weights)
    )
    if not at_equal_distances or distance < first.numel():
        return None
    return first.as_strided((len(weights), *first.shape), (distance, *first.stride()))


def lay_out(weights: Sequence[torch.nn.Parameter]) -> None:
    """Move parameters of one shape into one storage, one behind the other; quantized ones stay where they are."""
    if any(_quantized(weight) or weight.is_meta for weight in weights):
        return
    storage = torch.stack([weight.detach() for weight in weights])
    for weight, place in zip(weights, storage, strict=True):
        weight.data = place


def _quantized(weight: torch.Tensor) -> bool:
    """Whether it is one of Transformer Engine's tensors, which say that they are bfloat16 and hold bytes and scales."""
    return type(weight).__module__.startswith("transformer_engine")


class RegisteredBackwards(torch.nn.ModuleList):
    """Modules in order, whose parameters are listed from the last module to the first.

    Megatron's parameter buffer holds the parameters of a model in the reverse of the order in which they are listed
    (param_and_grad_buffer.py: `params[::-1]`), so the experts of a layer lie there in order and at equal distances.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        for index, module in reversed(list(enumerate(modules))):
            self.add_module(str(index), module)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return iter([self[index] for index in range(len(self))])
