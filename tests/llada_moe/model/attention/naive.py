"""Attention written down directly, in float64, and drawn batches of packed documents for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

from llada_megatron.llada_moe.model.attention.doubled_documents import DoubledDocuments, pack_doubled
from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments, pack
from llada_megatron.llada_moe.model.context_slices import Run, held_runs
from llada_megatron.llada_moe.model.patterns import AttentionPattern, segments

SIZE = 8


@dataclass(frozen=True)
class Case:
    """Documents of `batch` sequences, a pattern, and the queries of one of the ranks that hold a sequence together."""

    positions: int
    lengths: tuple[tuple[int, ...], ...]
    block: int | None
    rank: int
    ranks: int
    heads: int
    kv_heads: int

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def pattern(self) -> AttentionPattern:
        return AttentionPattern(self.block)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The rank's queries."""
        return held_runs(self.positions, self.rank, self.ranks, self.pattern)

    @property
    def queries(self) -> list[int]:
        """Their positions."""
        return [position for run in self.runs for position in range(*run)]

    @property
    def boundaries(self) -> torch.Tensor:
        """As a batch has them."""
        return torch.tensor([0, *(length for row in self.lengths for length in row)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )

    def packed(self) -> PackedDocuments:
        return pack(segments(self.boundaries, self.positions), self.pattern, self.positions, self.runs)

    def seen(self) -> torch.Tensor:
        """Who sees whom, position by position: bool `[batch, positions, positions]`."""
        seen = torch.zeros(self.batch, self.positions, self.positions, dtype=torch.bool)
        for row, lengths in enumerate(self.lengths):
            start = 0
            for length in lengths:
                for query in range(length):
                    last = length if self.block is None else (query // self.block + 1) * self.block
                    seen[row, start + query, start : start + min(length, last)] = True
                start += length
        return seen

    def inputs(self) -> list[torch.Tensor]:
        """This rank's queries, all keys and values, and a gradient of the result; float32."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        query, key, value, upstream = (
            torch.randn(self.positions, self.batch, count, SIZE, generator=generator) for count in heads
        )
        return [query[self.queries].clone(), key, value, upstream[self.queries].flatten(2)]


@st.composite
def cases(draw, blocks=(None, 1, 3, 8, 64), ranks=(1, 2, 3)):
    """Sequences of one or many documents, up to ones of one token, on one rank or a part of one."""
    count = draw(st.sampled_from(ranks))
    positions = count * draw(st.integers(1, 30))
    batch = draw(st.integers(1, 3))
    lengths = []
    for _ in range(batch):
        cuts = sorted(draw(st.sets(st.integers(1, max(1, positions - 1)), max_size=6)))
        edges = [0, *(cut for cut in cuts if cut < positions), positions]
        lengths.append(tuple(b - a for a, b in pairwise(edges)))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 1)]))
    block = draw(st.sampled_from(blocks))
    return Case(positions, tuple(lengths), block, draw(st.integers(0, count - 1)), count, heads, kv_heads)


@dataclass(frozen=True)
class DoubledCase(Case):
    """`lengths` are those of the documents in each half of the `positions`."""

    causal_clean: bool = False

    @property
    def boundaries(self) -> torch.Tensor:
        lengths = [0, *(length for row in self.lengths for length in (*row, *row))]
        return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @property
    def pattern(self) -> AttentionPattern:
        return AttentionPattern(self.block, doubled=True, causal_clean=self.causal_clean)

    def packed(self) -> DoubledDocuments:
        return pack_doubled(segments(self.boundaries, self.positions), self.pattern, self.positions, self.runs)

    def seen(self) -> torch.Tensor:
        """Equation 3 of LLaDA2.0's report, pair by pair, inside documents: bool `[batch, positions, positions]`; or
        the same with each clean position as a block of its own, as clean ones see it."""
        half = self.positions // 2
        clean = torch.arange(self.positions) >= half
        seen = []
        for lengths in self.lengths:
            document = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)]).repeat(2)
            block = torch.cat([torch.arange(length) // self.block for length in lengths]).repeat(2)
            query, key = block[:, None], block[None]
            of_noisy = torch.where(clean[None], query > key, query == key)
            if self.causal_clean:
                query, key = (torch.arange(self.positions).view(shape) for shape in ((-1, 1), (1, -1)))
            of_clean = clean[None] & (query >= key)
            seen.append((document[:, None] == document[None]) & torch.where(clean[:, None], of_clean, of_noisy))
        return torch.stack(seen)


@st.composite
def doubled_cases(draw, blocks=(1, 2, 3, 8, 64), ranks=(1, 2, 3, 4)):
    """The documents of a case, in both halves."""
    one = draw(cases(blocks=blocks, ranks=(1,)))
    count = draw(st.sampled_from([ranks for ranks in ranks if one.positions * 2 % ranks == 0]))
    rank = draw(st.integers(0, count - 1))
    causal = draw(st.booleans())
    return DoubledCase(one.positions * 2, one.lengths, one.block, rank, count, one.heads, one.kv_heads, causal)


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`[queries, batch, heads * size]` from `[positions, batch, heads, size]` and bool `[batch, queries, keys]`."""
    key, value = (part.repeat_interleave(query.size(2) // part.size(2), dim=2) for part in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * query.size(3) ** -0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def expected(case: Case) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values, in float64."""
    seen = case.seen()[:, case.queries]
    return evaluated(lambda q, k, v: softmax_attention(q, k, v, seen), case, torch.float64)


def evaluated(attend: Callable[..., torch.Tensor], case: Case, dtype: torch.dtype = torch.float32) -> list:
    """Output of `attend(query, key, value)` and the gradients of the three."""
    *parts, upstream = (part.to(dtype) for part in case.inputs())
    parts = [part.requires_grad_() for part in parts]
    out = attend(*parts)
    out.backward(upstream)
    return [out.detach(), *(part.grad for part in parts)]


def largest_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest norm of the difference of a pair of tensors, relative to the norm of the second, or to that of as many
    ones where it is smaller: gradients of scores vanish where a query sees one key."""
    return max(float((a - b).norm() / b.norm().clamp_min(b.numel() ** 0.5)) for a, b in zip(found, wanted, strict=True))


def attention_over_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: list[int],
    key_starts: list[int],
    causal: bool,
) -> torch.Tensor:
    """What calls over packed documents compute, `[tokens, heads * size]`: causal ones align the last query and key."""
    found = []
    for (a, b), (c, d) in zip(pairwise(query_starts), pairwise(key_starts), strict=True):
        seen = torch.ones(1, b - a, d - c, dtype=torch.bool)
        if causal:
            seen = seen.tril((d - c) - (b - a))
        q, k, v = query[a:b, None], key[c:d, None], value[c:d, None]
        found.append(softmax_attention(q, k, v, seen)[:, 0])
    return torch.cat(found)
