"""Windows cover a split's tokens once, in corpus order, with the documents' boundaries."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.data.indexed import TokenFile, token_dtype
from llada_megatron.llada_moe.data.packing import PackedDataset, held_out
from llada_megatron.llada_moe.errors import DataError


def documents_of(prefix, split, fraction):
    """The split's documents, read one by one."""
    file = TokenFile(prefix)
    held = set(held_out(0, file.documents, fraction).tolist())
    chosen = [d for d in range(file.documents) if (d in held) == (split == "validation")]
    return [file.tokens[a : a + n].tolist() for a, n in map(file.span, chosen)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    window=st.integers(1, 50),
    split=st.sampled_from(["train", "validation"]),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    isolate=st.booleans(),
)
def test_windows_are_the_stream_of_the_split(write_set, lengths, window, split, fraction, isolate):
    prefix = write_set("set", lengths)
    documents = documents_of(prefix, split, fraction)
    stream = [token for document in documents for token in document]
    starts = set(np.cumsum([0, *map(len, documents)]).tolist())
    try:
        packed = PackedDataset(prefix, window, split, fraction, 0, isolate)
    except DataError as error:
        assert len(stream) < window and str(len(stream)) in str(error) and str(window) in str(error)
        return
    assert (packed.tokens, packed.windows, packed.documents) == (len(stream), len(stream) // window, len(documents))
    assert packed.bytes == 3 * len(stream) and packed.bytes_per_token == 3
    for i in range(packed.windows):
        tokens, boundaries = packed.window(i)
        assert tokens.dtype == np.int64 and boundaries.dtype == np.int32
        assert tokens.tolist() == stream[i * window : (i + 1) * window]
        inside = [s - i * window for s in sorted(starts) if i * window < s < (i + 1) * window]
        assert boundaries.tolist() == [0, *(inside if isolate else []), window]


def test_splits_part_the_documents_whatever_the_seed(write_set):
    prefix = write_set("set", [7] * 500)
    train, validation = (PackedDataset(prefix, 7, s, 0.2, 1, True) for s in ("train", "validation"))
    assert train.documents + validation.documents == 500 and 70 < validation.documents < 130
    first = [PackedDataset(prefix, 7, "validation", 0.2, seed, True).window(3)[0].tolist() for seed in (1, 2)]
    assert first[0] == first[1]


def test_held_out_documents_do_not_depend_on_those_that_follow():
    assert held_out(0, 100, 0.3).tolist() == [d for d in held_out(0, 1000, 0.3).tolist() if d < 100]
    assert np.concatenate([held_out(0, 40, 0.3), held_out(40, 100, 0.3)]).tolist() == held_out(0, 100, 0.3).tolist()
    assert held_out(0, 100, 0.0).size == 0 and held_out(0, 100, 1.0).size == 100


def test_order_is_a_permutation_of_each_epoch(write_set):
    packed = PackedDataset(write_set("set", [50] * 20), 10, "train", 0.0, 3, True)
    orders = [[packed.order(epoch, place) for place in range(packed.windows)] for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_empty_split_says_the_arithmetic(write_set):
    prefix = write_set("set", [30] * 3)
    with pytest.raises(DataError, match=r"holds 3, 90 tokens; one window takes 128"):
        PackedDataset(prefix, 128, "train", 0.0, 0, True)


def test_window_outside_is_refused(write_set):
    packed = PackedDataset(write_set("set", [30]), 10, "train", 0.0, 0, True)
    with pytest.raises(IndexError):
        packed.window(3)


def test_large_ids_take_four_bytes():
    assert token_dtype(65_499) is np.uint16 and token_dtype(65_500) is np.int32
