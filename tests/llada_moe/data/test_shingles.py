"""Shingles: what counts as the same text, and what is said of documents that share it."""

import random

import numpy as np
import pytest

from llada_megatron.llada_moe.data import shingles
from llada_megatron.llada_moe.data.shingles import LENGTH, ShingleTable, text_shingles

WORDS = [f"w{number}" for number in range(500)]


def text(seed, length=200):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def share(one, other):
    """Share of the first text's shingles that are in the other."""
    mine = text_shingles(one)
    return np.isin(mine, text_shingles(other)).mean()


def table_of(texts, **limits):
    table = ShingleTable(**limits)
    for content in texts:
        table.add([text_shingles(content)])
    return table


def test_space_between_words_does_not_count_and_everything_else_does():
    assert share("a b(c)\n  d " * 9, "\ta b ( c )d  " * 9) == 1.0
    for other in (text(1).replace(" ", "_", 1), text(1).replace("w", "v", 1), text(1).replace(" ", ", ", 1)):
        assert 0.9 < share(text(1), other) < 1.0
    assert share("ab cd " * 20, "abc d " * 20) == 0.0


def test_a_word_more_makes_as_many_shingles_new_as_hold_it():
    words = text(2, 100).split()
    other = " ".join([*words[:50], "new", *words[50:]])
    assert len(text_shingles(" ".join(words))) == 91 and share(" ".join(words), other) == pytest.approx(82 / 91)


def test_letters_of_languages_without_spaces_are_words():
    assert len(text_shingles("这是一个没有空格的句子它有很多字")) == 16 - LENGTH + 1
    assert len(text_shingles("слово" * 3 + " ещё" * 11)) == 2  # Cyrillic is written in words
    assert share("é\u00adà " * 12, "é\u00adà\u2028" * 12) < 1.0


def test_short_texts_and_texts_without_a_word():
    assert len(text_shingles("return 1")) == 1 and share("return 1", "return  1\n") == 1.0
    assert share("return 1", "return 2") == 0.0
    assert len(text_shingles("")) == len(text_shingles(" \n\t")) == 0


@pytest.mark.parametrize("piece", [5, 35, 200])
def test_pieces_of_a_long_text_are_one_text(monkeypatch, piece):
    content = " ".join(word[:4].ljust(4, "_") for word in text(3, 100).split())
    whole = text_shingles(content)
    monkeypatch.setattr(shingles, "_PIECE", piece)
    assert text_shingles(content).tolist() == whole.tolist()


def test_copies_are_counted_after_the_first_and_repeated_ones_on_both_sides():
    base = text(4)
    part = " ".join(base.split()[:60])
    shared = table_of([part, text(5), base, text(6), base + " end", part]).shared()
    assert shared.copies(0.8).tolist() == [4, 5]  # 2 holds all of 0, but is mostly new
    assert shared.repeated(0.5, np.array([4, 5])).tolist() == [0]
    assert shared.repeated(0.5, np.empty(0, np.int64)).tolist() == [0, 2, 4, 5]
    assert table_of([text(7), text(8), ""]).shared().repeated(0.5, np.empty(0, np.int64)).tolist() == []
    assert ShingleTable().shared().copies(0.8).tolist() == []


def test_parts_that_lie_in_several_documents_add_up():
    words = text(9, 300).split()
    thirds = [" ".join(words[start : start + 109]) for start in (0, 100, 191)]
    assert table_of([*thirds, " ".join(words)]).shared().copies(0.8).tolist() == [3]
    assert all(share(" ".join(words), third) < 0.4 for third in thirds)


def test_a_full_table_keeps_a_sample_that_says_the_same():
    base = text(10, 4000)
    texts = [base, text(11, 4000), base[: len(base) * 2 // 3] + text(12, 1300), base[: len(base) // 3] + text(13, 2600)]
    table = table_of(texts, limit=4000)
    assert table._held <= 4000 and table.modulus == 4
    shared = table.shared()
    sizes = np.diff(shared._bounds) / shared._sizes
    assert sizes[1] == 0 and sizes[2] == pytest.approx(2 / 3, abs=0.05) and sizes[3] == pytest.approx(1 / 3, abs=0.05)
    assert set(text_shingles(base, 4)) == set(text_shingles(base)[text_shingles(base) % 4 == 0])
