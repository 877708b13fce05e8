"""Windows cut from documents, and what is known of each position, against small cases by hand."""

import numpy as np

from llada_megatron.llada_moe.evaluation.text_windows import TextWindow, cut_windows, draw_mask, window_facts


def test_windows_hold_consecutive_documents_and_their_starts():
    documents = [np.arange(3), np.arange(10, 15), np.arange(0), np.arange(20, 29)]
    windows = list(cut_windows(iter(documents), 4, 10, source=1))
    assert [window.tokens.tolist() for window in windows] == [
        [0, 1, 2, 10],
        [11, 12, 13, 14],
        [20, 21, 22, 23],
        [24, 25, 26, 27],
    ]
    assert [window.boundaries.tolist() for window in windows] == [[0, 3, 4], [0, 4], [0, 4], [0, 4]]
    assert {window.source for window in windows} == {1}
    assert len(list(cut_windows(iter(documents), 4, 2, source=0))) == 2


def test_a_mask_has_its_share_and_depends_on_the_key_alone():
    mask = draw_mask(64, 0.3, (0, 1, 2))
    assert mask.sum() == 19 and (mask == draw_mask(64, 0.3, (0, 1, 2))).all()
    assert (mask != draw_mask(64, 0.3, (0, 1, 3))).any()
    assert not draw_mask(64, 0.0, (0,)).any() and draw_mask(64, 1.0, (0,)).all()


def test_blocks_are_counted_from_each_document_and_only_whole_ones_have_a_number():
    window = TextWindow(np.arange(8), np.array([0, 5, 8]), source=2)
    ratio, masked, tokens, position, block, source, number = window_facts(window, np.zeros(8, bool), 1, 2, 3)
    assert position.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert block.tolist() == [24, 24, 26, 26, -1, 29, 29, -1]
    assert set(ratio) == {1} and set(source) == {2} and set(number) == {3} and not masked.any()
    assert tokens.tolist() == list(range(8))
