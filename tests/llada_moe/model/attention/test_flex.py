"""What FlexAttention is given: who sees whom, its tiles for the forward and the backward pass, and how it is compiled.

On a CPU torch's FlexAttention has no backward pass, and looks at tiles only where it is compiled, which takes more than
half a minute. The results here are therefore those of the mask alone, and the tables of tiles are read.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.model.attention import flex, pattern_attention
from llada_megatron.llada_moe.model.attention.backends import Backend, Choice
from llada_megatron.llada_moe.model.compiled import of_a_kind
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.transformer import build_model
from llada_megatron.parallel.build import transformer_config
from llada_megatron.tools.bench.attention import document_boundaries
from llada_megatron.tools.bench.measurement import single_process
from tests.llada_moe.model.attention.naive import Case, DoubledCase, cases, doubled_cases, expected, largest_error

EXACT = 1e-6
HOST = torch.device("cpu")


@pytest.mark.parametrize(
    "case",
    [Case(40, ((10, 30), (40,)), 8, 0, 1, 4, 2), DoubledCase(40, ((13, 7),), 8, 0, 1, 2, 1)],
    ids=["packed", "both halves"],
)
def test_its_result(case):
    query, key, value, _ = case.inputs()
    found = flex.attend(query, key, value, case.packed(), None)
    assert largest_error([found], expected(case)[:1]) < EXACT


@settings(derandomize=True, deadline=None, max_examples=40)
@given(doubled_cases())
def test_the_keys_that_each_query_of_both_halves_sees(case):
    (a, b), (c, d) = case.packed().key_ranges()
    keys = torch.arange(case.positions).numpy()
    seen = ((a[..., None] <= keys) & (keys < b[..., None])) | ((c[..., None] <= keys) & (keys < d[..., None]))
    assert (torch.from_numpy(seen) == case.seen()[:, case.queries]).all()


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Which tiles a table names, bool `[batch, rows, columns]`; each is named once."""
    counts, indices = counts[:, 0], indices[:, 0].long()
    named = torch.arange(indices.size(2)) < counts[..., None]
    found = torch.zeros(indices.shape, dtype=torch.int64).scatter_add_(2, indices, named.long())
    assert torch.equal(found.sum(2), counts.long()) and bool((found <= 1).all())
    return found.bool()


def tiles_are_right(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare a case's mask, and the tables of its tiles, with who sees whom, pair by pair.

    Returns:
        Tiles that are computed with the mask and without it, bool `[batch, rows, columns]`.
    """
    tile, mask = flex.TILE, flex.block_mask(case.packed(), HOST)
    seen = case.seen()[:, case.queries]
    batch, queries, keys = (torch.arange(size) for size in seen.shape)
    assert torch.equal(mask.mask_mod(batch[:, None, None], 0, queries[:, None], keys), seen)
    assert mask.seq_lengths == tuple(seen.shape[1:])
    seen = torch.nn.functional.pad(seen, (0, -seen.size(2) % tile, 0, -seen.size(1) % tile))
    pairs = seen.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))  # [batch, rows, tile, columns, tile]
    some, every = pairs.any(4).any(2), pairs.all(4).all(2)
    masked, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(masked | whole, some) and not bool((masked & whole).any())
    assert not bool((whole & ~every).any())
    of_one_half = torch.ones(some.size(2), dtype=torch.bool)
    if case.pattern.doubled:  # the tile where the halves meet lies in two ranges of keys
        of_one_half[case.positions // 2 // tile] = case.positions // 2 % tile == 0
    assert torch.equal(whole[:, :, of_one_half], every[:, :, of_one_half])
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), masked.transpose(1, 2))
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), whole.transpose(1, 2))
    return masked, whole


@settings(derandomize=True, deadline=None, max_examples=150)
@given(case=st.one_of(cases(), doubled_cases()), tile=st.sampled_from([4, 8]))
def test_the_mask_and_the_tiles_of_the_forward_and_the_backward_pass(case, tile):
    """Small tiles, so that a drawn case has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "TILE", tile)
        tiles_are_right(case)


@pytest.mark.parametrize("block", [None, 1, 32, 150])
@pytest.mark.parametrize(
    ("positions", "lengths", "ranks"),
    [(1024, ((1024,),), 1), (700, ((130, 250, 320), (699, 1)), 1), (1200, ((500, 120, 580),), 3)],
)
def test_tiles_of_the_size_that_the_kernels_have(positions, lengths, ranks, block):
    tiles_are_right(Case(positions, lengths, block, ranks - 1, ranks, 1, 1))


@pytest.mark.parametrize(
    ("lengths", "block", "causal"),
    [((300, 84), 32, False), ((384,), 160, False), ((700, 100, 224), 160, False), ((300, 84), 160, True)],
)
def test_tiles_of_both_halves_of_that_size(lengths, block, causal):
    half = sum(lengths)
    masked, whole = tiles_are_right(DoubledCase(2 * half, (lengths,), block, 0, 1, 2, 1, causal))
    assert bool(whole.any()) or block == 32 or causal  # some tiles are computed without a mask
    assert not bool((masked | whole).all())  # and some not at all


def test_the_block_mask_is_made_once_for_all_layers_and_again_for_another_batch(monkeypatch):
    model = ModelConfig(
        family="llada",
        num_layers=3,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        max_sequence_length=16,
        mask_token_id=63,
        eos_token_id=62,
    )
    made, used, counts, real = [], [], [], flex.block_mask

    def operation(query, key, value, block_mask, **_):
        used.append(block_mask)
        return query

    monkeypatch.setattr(flex, "block_mask", lambda *given: made.append(given) or real(*given))
    monkeypatch.setattr(flex, "_operation", lambda *_: operation)
    monkeypatch.setattr(pattern_attention, "attention_backend", lambda *_, **__: Choice(Backend.FLEX, ""))
    with single_process():
        built = build_model(model, transformer_config(model, LayoutConfig()), pattern=AttentionPattern(4))
        for documents in (2, 2, 4):
            built(torch.arange(16)[None], document_boundaries(16, documents), rows=torch.ones(1, 16, dtype=torch.bool))
            counts.append((len(made), len(used), len(set(map(id, used)))))
    assert counts == [(1, 3, 1), (1, 6, 1), (2, 9, 2)]


def stand_in(query, key, value, *, block_mask, scale, enable_gqa):
    """Of FlexAttention: depends on all that it is given, and is compiled in a fraction of its time."""
    rows, columns = (torch.arange(size, device=query.device) for size in (query.size(2), key.size(2)))
    first = rows.new_zeros(1, 1)
    seen = block_mask.mask_mod(first, first, rows[:, None], columns)
    assert block_mask.seq_lengths == (query.size(2), key.size(2))
    tiles = block_mask.kv_num_blocks.sum() + block_mask.full_q_indices.sum()
    return query + seen.sum(1)[:, None] + tiles + (key.sum() + value.sum()) * (scale or 1.0)


@pytest.fixture
def compiled(monkeypatch):
    """FlexAttention as on a GPU, except for what is compiled; returns the counter."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_(function, backend=counter, **given))
    monkeypatch.setattr(flex, "_operation", lambda _, kind: of_a_kind(stand_in, kind))
    of_a_kind.cache_clear()
    yield counter
    of_a_kind.cache_clear()
    torch._dynamo.reset()


def attended(lengths: tuple[int, ...], block: int, *, doubled=False, gradients=False) -> None:
    half, copies = sum(lengths), 2 if doubled else 1
    case = (DoubledCase if doubled else Case)(half * copies, (lengths,), block, 0, 1, 2, 2)
    query, key, value, _ = (part.requires_grad_(gradients) for part in case.inputs())
    flex.attend(query, key, value, case.packed(), None)


LENGTHS = ((100, 212), (500, 60), (312,), (20, 7), (64,), (300, 301))


def test_it_is_compiled_a_few_times_for_all_lengths_of_each_kind_of_call(compiled):
    """More often than torch keeps compiled forms of one function, and it is never run uncompiled."""
    kinds = [{}, {"doubled": True, "gradients": True}]
    with torch._dynamo.config.patch(recompile_limit=3):
        for (number, lengths), kind in itertools.product(enumerate(LENGTHS), kinds):
            attended(lengths, 8 * (number + 1), **kind)
    assert 3 < compiled.frame_count <= 3 * len(kinds)


def test_it_is_refused_where_torch_would_run_it_uncompiled(compiled):
    with torch._dynamo.config.patch(recompile_limit=1):
        attended((100, 212), 8)
        with pytest.raises(RuntimeError, match="stand_in was compiled for too many sorts of calls"):
            attended((500,), 8)
