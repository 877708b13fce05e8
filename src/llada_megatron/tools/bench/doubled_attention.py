"""The part of `llada bench attention` over `[x_t ; x_0]`: against torch's attention with the pattern as a dense mask.

A dense mask pays for all pairs of positions of both halves, of which a quarter see each other, and its backward pass
keeps the mask in the type of the queries, once a layer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_most, reported
from llada_megatron.tools.bench.measurement import peak_bytes

if TYPE_CHECKING:
    import torch

    Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TIME_GOAL, MEMORY_GOAL, LINEAR_GOAL, EXACT_GOAL = 0.32, 0.25, 1.1, 1e-5
_HEADS, _HEAD_DIM = 4, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the problem."""
    parser.add_argument(
        "--half", type=int, default=2048, help="positions of each half of [x_t ; x_0] (default %(default)s)"
    )
    parser.add_argument(
        "--longest-half", type=int, default=16384, help="up to which memory is linear (default %(default)s)"
    )


def claims(args: argparse.Namespace) -> list[Claim]:
    """Time and memory of forward and backward pass beside a dense mask; memory by length; equal results."""
    from llada_megatron.parallel.training.peak import timed
    from llada_megatron.tools.bench.loss import largest_difference

    ours, dense = Halves(args.half, args.block, _HEADS), Halves(args.half, args.block, _HEADS)
    pairs = [
        (name, halves, attend)
        for name, halves, attend in (
            ("ours", ours, ours.pattern_attention()),
            ("dense mask", dense, dense.dense_mask()),
        )
    ]
    results = [halves.results(attend) for _, halves, attend in pairs]  # also what is set up at a first call
    memory = {name: peak_bytes(lambda h=halves, a=attend: h.results(a)) for name, halves, attend in pairs}
    seconds: dict[str, list[float]] = {name: [] for name, *_ in pairs}
    for _ in range(args.repeats):  # in turn, so that what else the machine does falls on both
        for name, halves, attend in pairs:
            seconds[name].append(timed(lambda h=halves, a=attend: h.results(a), halves.where))
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    for name in middle:
        message(
            f"[x_t ; x_0], {args.half} + {args.half}, {name}: {1000 * middle[name]:.0f} ms, "
            f"{memory[name] / 2**20:.1f} MiB"
        )
    of_position = _memory_by_length(args)
    exact = EXACT_GOAL if ours.where.type == "cpu" else 2e-2  # bf16 has three digits
    what = f"[x_t ; x_0], 2 x {args.half}, blocks of {args.block}"
    return [
        at_most(f"{what}: time forward + backward / dense mask", middle["ours"] / middle["dense mask"], "x", TIME_GOAL),
        at_most(f"{what}: peak memory / dense mask", memory["ours"] / memory["dense mask"], "x", MEMORY_GOAL),
        at_most(f"{what}: largest relative difference from the dense mask", largest_difference(*results), "", exact),
        at_most(
            f"[x_t ; x_0]: peak memory per position, {max(of_position)} / {min(of_position)} positions of a half",
            of_position[max(of_position)] / of_position[min(of_position)],
            "x",
            LINEAR_GOAL,
        ),
        reported(f"{what}: time forward + backward", 1000 * middle["ours"], "ms"),
        reported(f"{what}: peak memory", memory["ours"] / 2**20, "MiB"),
    ]


def _memory_by_length(args: argparse.Namespace) -> dict[int, float]:
    """Peak bytes of a forward and backward pass of one head, per position of a half, by its length."""
    found = {}
    length = min(1024, args.longest_half)
    while length <= args.longest_half:
        halves = Halves(length, args.block, 1)
        attend = halves.pattern_attention()
        if not found:
            halves.results(attend)
        found[length] = peak_bytes(lambda h=halves, a=attend: h.results(a)) / length
        message(f"[x_t ; x_0], {length} + {length}, one head: {found[length] / 2**10:.2f} KiB a position")
        length *= 4
    return found


class Halves:
    """Queries, keys and values of one sequence `[x_t ; x_0]` that is one document."""

    def __init__(self, half: int, block: int, heads: int) -> None:
        import torch

        from llada_megatron.llada_moe.model.patterns import AttentionPattern
        from llada_megatron.parallel import device

        self.where = where = device.current()
        self.half, self.heads = half, heads
        self.pattern = AttentionPattern(block, doubled=True)
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(2 * half, 1, heads, _HEAD_DIM, generator=generator) for _ in range(4)]
        *self.tensors, upstream = (tensor.to(where, dtype) for tensor in made)
        self.upstream = upstream.flatten(2)

    def results(self, attend: Attend) -> list[torch.Tensor]:
        """The result and the gradients of queries, keys and values."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        out = attend(*leaves)
        out.backward(self.upstream)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def pattern_attention(self) -> Attend:
        """What training runs on this machine."""
        from llada_megatron.tools.bench.attention import attention_module

        module = attention_module(self.heads, _HEAD_DIM, self.pattern)
        return lambda q, k, v: module(q, k, v, None)

    def dense_mask(self) -> Attend:
        """torch's attention with a mask of all pairs of positions, made once."""
        import torch

        seen = self._seen().to(self.tensors[0].device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return out.permute(2, 0, 1, 3).flatten(2)

        return attend

    def _seen(self) -> torch.Tensor:
        """Who sees whom, bool `[2 half, 2 half]` (LLaDA2.0, eq. 3)."""
        import torch

        block = torch.arange(self.half) // (self.pattern.block or self.half)
        query, key = block[:, None], block[None]
        noisy = torch.cat([query == key, query > key], dim=1)
        return torch.cat([noisy, torch.cat([torch.zeros_like(query == key), query >= key], dim=1)])
