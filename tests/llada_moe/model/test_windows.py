"""Passes over windows with kept keys against attention and routing over whole sequences, written down directly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.attention.pattern_attention import PatternAttention
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.windows import KeyValues, Window, Windows

SEQ, HEADS, KV_HEADS, SIZE, SLOTS = 40, 4, 2, 8, 4
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
CONFIG = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)


def attention(block: int | None) -> PatternAttention:
    groups = SimpleNamespace(cp=ALONE)
    return PatternAttention(
        CONFIG, 1, AttnMaskType.no_mask, "self", pg_collection=groups, pattern=AttentionPattern(block)
    )


def projected(seed: int) -> list[torch.Tensor]:
    """Queries, keys and values of all slots' sequences: each `[slots, heads, seq, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SLOTS, heads, SEQ, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def packed(parts: list[torch.Tensor], windows: list[Window]) -> list[torch.Tensor]:
    """What the windows take of these, as the layers have it: `[total, 1, heads, head_dim]`."""
    return [
        torch.cat([part[w.slot].index_select(1, w.positions).transpose(0, 1) for w in windows])[:, None]
        for part in parts
    ]


def run(block: int | None, parts: list[torch.Tensor], windows: list[Window], memory: KeyValues | None) -> torch.Tensor:
    """`[total, heads, head_dim]`."""
    positions = torch.cat([window.positions for window in windows])
    out = attention(block)(*packed(parts, windows), Windows(windows, memory, positions, SEQ))
    return out.view(-1, HEADS, SIZE)


def directly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of `[heads, queries, dim]` with keys `[kv_heads, keys, dim]` under a mask `[queries, keys]`."""
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=0) for part in (k, v))
    scores = (q @ k.transpose(1, 2)) * SIZE**-0.5
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)


@st.composite
def passes(draw):
    """Windows of different sequences, some of them alike."""
    block = draw(st.sampled_from([None, 1, 4, 8]))
    alike = draw(st.booleans())
    width = draw(st.integers(1, 8))
    windows = []
    for slot in sorted(draw(st.sets(st.integers(0, SLOTS - 1), min_size=1))):
        first = draw(st.integers(0, SEQ // 8 - 1)) * 8 if alike else draw(st.integers(0, SEQ - 1))
        last = first + (min(width, 8) if alike else draw(st.integers(1, SEQ - first)))
        drafted = draw(st.sampled_from([0, last - first, (last - first) // 2])) if block == 1 else 0
        windows.append(Window(slot, first, last - first, draw(st.integers(last, SEQ)), drafted=drafted))
    return block, windows


@settings(derandomize=True, deadline=None, max_examples=120)
@given(passes())
def test_a_window_sees_the_new_keys_of_its_own_positions_and_the_kept_ones_elsewhere(drawn):
    block, windows = drawn
    old, new = projected(1), projected(2)
    memory = KeyValues(SLOTS, SEQ)
    run(None, old, [Window(slot, 0, SEQ, SEQ) for slot in range(SLOTS)], memory)
    out, at = run(block, new, windows, memory), 0
    for w in windows:
        own = slice(w.first, w.first + w.width)
        keys, values = old[1][w.slot].clone(), old[2][w.slot].clone()
        keys[:, own], values[:, own] = new[1][w.slot, :, own], new[2][w.slot, :, own]
        seen = (torch.arange(SEQ) < w.keys).expand(w.width, -1)
        if block is not None:
            ordered = torch.arange(SEQ)[None] // block <= torch.arange(SEQ)[own, None] // block
            seen = seen & (ordered | (torch.arange(w.width) >= w.width - w.drafted)[:, None])
        expected = directly(new[0][w.slot, :, own], keys, values, seen)
        torch.testing.assert_close(out[at : at + w.width], expected)
        at += w.width


@pytest.mark.parametrize("block", [None, 8])
def test_whole_windows_need_no_memory(block):
    parts = projected(1)
    windows = [Window(0, 0, 16, 16), Window(2, 0, 24, 24)]
    torch.testing.assert_close(run(block, parts, windows, None), run(block, parts, windows, KeyValues(SLOTS, SEQ)))


def counts(windows: Windows, block: int | None) -> list[int]:
    return [len(run.windows) for run in windows.runs(block)]


def test_alike_windows_are_one_product_and_others_are_not():
    memory = KeyValues(SLOTS, SEQ)

    def runs(windows: list[Window], block: int | None) -> list[int]:
        return counts(Windows(windows, memory, torch.zeros(0), SEQ), block)

    alike = [Window(slot, 8 * slot, 8, 8 * slot + 8) for slot in range(4)]
    assert runs(alike, None) == runs(alike, 8) == [4]
    assert runs(alike, 4) == [1, 1, 1, 1]
    assert runs([alike[0], alike[2], alike[3]], 8) == [1, 2]
    assert counts(Windows(alike, None, torch.zeros(0), SEQ), None) == [1, 1, 1, 1]
    drafts = [Window(slot, 8, 8, 16, drafted=8 if slot < 3 else 4) for slot in range(4)]
    assert runs(drafts, 1) == [3, 1]


@pytest.mark.parametrize("keys", [24, SEQ])
def test_shadows_see_everything_but_the_draft_in_their_place_and_leave_no_trace(keys):
    parts, shadowed = projected(1), projected(2)
    window = Window(1, 4, 20, keys, shadow_first=8, shadows=8)
    memory, plain = KeyValues(SLOTS, SEQ), KeyValues(SLOTS, SEQ)
    whole = [Window(slot, 0, SEQ, SEQ) for slot in range(SLOTS)]
    for kept in (memory, plain):
        run(None, parts, whole, kept)
    inputs = [
        torch.cat([packed([part], [Window(1, 4, 20, keys)])[0], packed([other], [Window(1, 8, 8, keys)])[0]])
        for part, other in zip(parts, shadowed, strict=True)
    ]
    out = attention(None)(*inputs, Windows([window], memory, window.positions, SEQ)).view(-1, HEADS, SIZE)
    torch.testing.assert_close(out[:20], run(None, parts, [Window(1, 4, 20, keys)], plain))
    k, v = (torch.cat([parts[i][1][:, :keys], shadowed[i][1][:, 8:16]], dim=1) for i in (1, 2))
    seen = torch.cat(
        [~(torch.arange(keys)[None] == torch.arange(8, 16)[:, None]), torch.ones(8, 8, dtype=torch.bool)], 1
    )
    torch.testing.assert_close(out[20:], directly(shadowed[0][1][:, 8:16], k, v, seen))
    like = parts[1][:1]
    assert torch.equal(memory.layer(1, like), plain.layer(1, like))


def test_routing_blocks_are_counted_from_each_sequences_start():
    windows = [Window(0, 4, 10, 40), Window(3, 0, 5, 40, shadow_first=2, shadows=3)]
    numbered = Windows(windows, None, torch.zeros(18), SEQ)
    numbers, count = numbered.block_numbers(4)
    assert numbers.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] + [5] * 2 + [6]
    assert count == 7
    assert numbered.block_numbers(4)[0] is numbers  # of all layers of a pass, one counts
    assert numbered.block_numbers(8)[1] == 4
