"""Which shape serves a pass, and where a pass's tokens, positions, keys and rows stand in it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.model.windows import KeyValues, Window
from llada_megatron.llada_moe.sampling import pass_shapes
from llada_megatron.llada_moe.sampling.pass_shapes import contents, shape_of
from llada_megatron.llada_moe.sampling.passes import Pass

MEMORY = KeyValues(4, 2000)


def made(*windows: Window, rows: int = 3) -> Pass:
    total = sum(window.total for window in windows)
    wanted = torch.arange(total) >= total - rows
    return dataclasses.replace(Pass.idle(0), tokens=torch.arange(total), windows=list(windows), output_mask=wanted)


def test_steps_and_blocks_share_a_shape_until_the_kept_keys_outgrow_it():
    shapes = [shape_of(made(Window(0, at, 32, at + 32), rows=n), MEMORY) for at, n in ((64, 32), (80, 5), (96, 1))]
    assert len(set(shapes)) == 1
    assert (shapes[0].windows, shapes[0].width, shapes[0].keys, shapes[0].rows) == (1, 32, 128, 32)
    assert shape_of(made(Window(0, 100, 32, 132)), MEMORY).keys == 256
    assert shape_of(made(Window(0, 1900, 32, 1932)), MEMORY).keys == 2000
    assert shape_of(made(Window(0, 0, 50, 50)), None).keys == 64


def test_windows_lie_in_order_only_where_the_memory_holds_no_others_between_them():
    def shape(*slots: int):
        return shape_of(made(*(Window(slot, 0, 32, 64) for slot in slots)), MEMORY)

    assert shape(0, 1).in_order and shape(0, 1, 2, 3).in_order
    assert not shape(1, 2).in_order and not shape(1, 0).in_order
    assert not shape(0, 1, 2).in_order  # the fourth repeats the third, and must see its keys
    assert shape(0, 1, 2).windows == 4


def test_padding_repeats_the_last_token_of_a_window_and_the_last_window():
    work = made(Window(0, 10, 3, 40), Window(2, 4, 1, 20), Window(3, 6, 2, 8), rows=3)
    shape = shape_of(work, MEMORY)
    assert (shape.windows, shape.width, shape.rows) == (4, 32, 32)
    tokens, positions, seen, slots, rows = contents(work, shape, None).split(shape.sizes)
    each = [part.view(4, 32) for part in (tokens, positions, seen)]
    assert [part[0, :4].tolist() for part in each] == [[0, 1, 2, 2], [10, 11, 12, 12], [40] * 4]
    assert [part[1, :2].tolist() for part in each] == [[3, 3], [4, 4], [20, 20]]
    assert all(torch.equal(part[2], part[3]) for part in each) and each[0][2, -1] == 5
    assert slots.tolist() == [0, 2, 3, 3]
    assert rows[:4].tolist() == [32, 64, 65, 65] and torch.equal(tokens[rows[:3]], work.tokens[work.output_mask])


def test_a_query_sees_the_keys_up_to_the_end_of_its_block():
    work = made(Window(0, 6, 6, 11))
    seen = contents(work, shape_of(work, MEMORY), 4).split(32)[2]
    assert seen[:6].tolist() == [8, 8, 11, 11, 11, 11]


def test_masks_behind_a_causal_text_see_all_keys():
    work = made(Window(0, 6, 6, 12, drafted=4), Window(1, 0, 2, 2))
    seen = contents(work, shape_of(work, MEMORY), 1).split(64)[2].view(2, 32)
    assert seen[0, :7].tolist() == [7, 8, 12, 12, 12, 12, 12] and seen[1, :3].tolist() == [1, 2, 2]


def test_a_pass_without_rows_asks_for_none():
    work = made(Window(0, 0, 32, 32), rows=0)
    assert shape_of(work, MEMORY).rows == 0 and contents(work, shape_of(work, MEMORY), None).numel() == 97


def test_windows_of_different_widths_are_padded_where_the_weights_take_longer_than_the_padding():
    work = made(*(Window(slot, 64, 64 if slot == 0 else 32, 128) for slot in range(32)))
    memory = KeyValues(32, 2000)
    assert "different widths" in shape_of(work, memory)
    shape = shape_of(work, memory, 64 / 8)
    assert (shape.windows, shape.width) == (32, 64)


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        ([Window(0, 0, 8, 8, shadow_first=0, shadows=4)], "shadows"),
        ([Window(0, 0, 5000, 5000)], f"more than {pass_shapes.MOST_POSITIONS} positions"),
        ([Window(0, 0, 32, 900), Window(1, 0, 900, 900)], "different widths"),
    ],
)
def test_passes_that_no_shape_serves(windows, reason):
    assert reason in shape_of(made(*windows), KeyValues(2, 5000))
