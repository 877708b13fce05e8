"""`llada bench attention`: attention over packed documents, and what its backward pass writes for few and many.

A window of `--length` positions holds 1 to `--documents` equal documents. Beside what training runs stands the way it
was before, kept here only: a loop that takes each document's queries, keys and values as slices. The gradient of a
slice is as large as what it was taken from, so that this loop writes documents times window. The yardstick of both is
a window of one document, which has the most products to compute: more documents should cost no more than it does.

Bytes are those of the tensors that the operators of the backward pass return, views apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, at_most, doubled_attention, reported

if TYPE_CHECKING:
    import torch

    from llada_megatron.llada_moe.model.patterns import AttentionPattern

BYTES_GOAL, TIME_GOAL, EXACT_GOAL = 1.2, 1.5, 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the problem."""
    parser.add_argument("--length", type=int, default=4096, help="positions of the window (default %(default)s)")
    parser.add_argument("--documents", type=int, default=512, help="most documents in it (default %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="heads of queries, keys and values (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=32, help="features of a head (default %(default)s)")
    parser.add_argument("--block", type=int, default=32, help="of the block-causal pattern (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, of which the median counts")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    doubled_attention.add_arguments(parser)


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures full attention, attention over causal blocks, and over `[x_t ; x_0]`.

    Raises:
        ConfigError: more documents than positions.
    """
    if not 1 <= args.documents <= args.length:
        raise ConfigError(f"--documents {args.documents}: a window of --length {args.length} holds 1 to {args.length}")
    import torch

    from llada_megatron.tools.bench.measurement import single_process

    if args.threads:
        torch.set_num_threads(args.threads)
    with single_process():
        from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern

        return [
            *_claims(args, FULL, "full"),
            *_claims(args, AttentionPattern(args.block), f"blocks of {args.block}"),
            *doubled_attention.claims(args),
        ]


def document_boundaries(length: int, documents: int) -> torch.Tensor:
    """Of a window of `length` positions with documents as equal as they can be: int32 `[documents + 1]`."""
    import torch

    return torch.linspace(0, length, documents + 1).round().int()


def attention_module(heads: int, head_dim: int, pattern: AttentionPattern) -> Any:
    """The core attention of a layer, as this machine builds it, on a rank of its own."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from llada_megatron.llada_moe.model.spec import provider

    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0), tp=None)
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * head_dim, num_attention_heads=heads, attention_dropout=0.0
    )
    return provider().core_attention()(config, 1, AttnMaskType.no_mask, "self", pg_collection=groups, pattern=pattern)


def loop_over_slices(pattern: AttentionPattern) -> Callable[..., torch.Tensor]:
    """Attention of one window as it was: every document and every band of it sliced out of the whole."""
    import torch

    from llada_megatron.llada_moe.model.attention.per_document import QUERIES_AT_ONCE, band_mask, product
    from llada_megatron.llada_moe.model.patterns import bands

    def of_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        block, length = pattern.block, q.size(2)
        if block is None:
            return product(q, k, v, None)
        span, found = block * max(1, QUERIES_AT_ONCE // block), []
        for band in bands(0, length, length, block, span):
            mask = band_mask(band, length, block, span, q)
            mine, keys, values = q[:, :, band.start : band.stop], k[:, :, : band.keys], v[:, :, : band.keys]
            found.append(product(mine, keys, values, None, attn_mask=mask))
        return torch.cat(found, dim=2)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
        parts = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        found = [of_document(*(part[:, :, a:b] for part in parts)) for a, b in pairwise(boundaries.tolist())]
        return torch.cat(found, dim=2).permute(2, 0, 1, 3).flatten(2)

    return attend


class Problem:
    """One window's queries, keys and values, attended to in documents."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from llada_megatron.parallel import device

        where = device.current()
        self.dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        self.length = args.length
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(args.length, 1, args.heads, args.head_dim, generator=generator) for _ in range(4)]
        *self.tensors, upstream = (tensor.to(where, self.dtype) for tensor in made)
        self.upstream = upstream.flatten(2)

    def backward(self, attend: Callable[..., torch.Tensor], documents: int) -> tuple[Callable[[], None], list]:
        """A backward pass that is ready to run, the result, and the leaves whose gradients it makes."""
        leaves = [tensor.detach().clone().requires_grad_() for tensor in self.tensors]
        out = attend(*leaves, document_boundaries(self.length, documents))
        return lambda: out.backward(self.upstream), [out, *leaves]

    def results(self, attend: Callable[..., torch.Tensor], documents: int) -> list[torch.Tensor]:
        """The result and the gradients of queries, keys and values."""
        backward, (out, *leaves) = self.backward(attend, documents)
        backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def written(self, attend: Callable[..., torch.Tensor], documents: int) -> int:
        """Bytes that the backward pass writes."""
        from llada_megatron.tools.bench.measurement import written_bytes

        return written_bytes(self.backward(attend, documents)[0])

    def seconds(self, attend: Callable[..., torch.Tensor], documents: int, repeats: int) -> float:
        """Time of the backward pass, the median of `repeats`."""
        from llada_megatron.parallel.training.peak import timed

        return statistics.median(
            timed(self.backward(attend, documents)[0], self.tensors[0].device) for _ in range(repeats)
        )


def _claims(args: argparse.Namespace, pattern: AttentionPattern, name: str) -> list[Claim]:
    from llada_megatron.llada_moe.model.attention.backends import attention_backend
    from llada_megatron.tools.bench.loss import largest_difference

    problem, ours, loop = Problem(args), attention_module(args.heads, args.head_dim, pattern), loop_over_slices(pattern)
    where = problem.tensors[0].device.type
    chosen = attention_backend(pattern, where, problem.dtype, head_dim=args.head_dim, engine=ours.engine is not None)
    message(f"{name}: {chosen.backend.value} ({chosen.reason}); {args.length} positions, {problem.dtype}")
    problem.results(ours, 1), problem.results(loop, 1)  # what is set up at a first call is no part of the figures
    counts = _counts(args.documents)
    written = {count: problem.written(ours, count) for count in counts}
    seconds = {count: problem.seconds(ours, count, args.repeats) for count in counts}
    for count in counts:
        message(f"  {count:>5} documents: {written[count] / 1e6:8.1f} MB written, {1000 * seconds[count]:8.1f} ms")
    most = counts[-1]
    loop_written, loop_seconds = problem.written(loop, most), problem.seconds(loop, most, 1)
    message(f"  {most:>5}, as slices: {loop_written / 1e6:8.1f} MB written, {1000 * loop_seconds:8.1f} ms")
    different = max(largest_difference(problem.results(ours, n), problem.results(loop, n)) for n in (1, most))
    goal = EXACT_GOAL if where == "cpu" else 2e-2  # bf16 has three digits
    return [
        at_most(f"{name}: bytes written backward, {most} documents / one", written[most] / written[1], "x", BYTES_GOAL),
        at_most(f"{name}: time backward, {most} documents / one", seconds[most] / seconds[1], "x", TIME_GOAL),
        at_most(f"{name}: largest relative difference from the loop over slices", different, "", goal),
        reported(f"{name}: bytes written backward, {most} documents", written[most] / 1e6, "MB"),
        reported(f"{name}: the same by the loop over slices", loop_written / 1e6, "MB"),
        reported(
            f"{name}: time backward of the loop over slices, {most} documents / ours", loop_seconds / seconds[most], "x"
        ),
    ]


def _counts(most: int) -> list[int]:
    """Numbers of documents to measure: 1, 8, 64, … and `most`."""
    return [*(8**power for power in range(10) if 8**power < most), most] if most > 1 else [1]
