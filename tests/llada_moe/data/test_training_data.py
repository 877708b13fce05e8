"""Batches are a function of sample numbers: whatever the split, the order or the process."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from llada_megatron.llada_moe.data.set_manifest import prefix_file, read_manifest
from llada_megatron.llada_moe.data.training_data import TrainingData
from llada_megatron.llada_moe.errors import ConfigError, DataError

LENGTHS = [3, 70, 1, 200, 64, 15] * 30


@pytest.fixture
def two_sets(write_set):
    return [write_set("a", LENGTHS), write_set("b.v2", [40] * 100)]


def equal(left, right):
    assert left.drafted is right.drafted is None
    return all(torch.equal(value, getattr(right, name)) for name, value in vars(left).items() if value is not None)


def test_shapes_and_types(two_sets, make_run):
    batch = TrainingData(make_run(two_sets)).batch(range(5))
    assert batch.inputs.shape == batch.labels.shape == batch.weights.shape == (5, 64)
    assert batch.mask_ratio.shape == batch.untruncated.shape == batch.answer.shape == (5,)
    assert (batch.inputs.dtype, batch.labels.dtype, batch.untruncated.dtype, batch.answer.dtype) == (torch.int64,) * 4
    assert (batch.weights.dtype, batch.mask_ratio.dtype) == (torch.float32,) * 2
    assert batch.boundaries.dtype == torch.int32
    assert batch.boundaries[0] == 0 and batch.boundaries[-1] == 5 * 64 and (batch.boundaries.diff() > 0).all()
    assert set(range(0, 5 * 64, 64)) <= set(batch.boundaries.tolist())


def test_diffusion_batch_holds_the_forward_process(two_sets, make_run):
    batch = TrainingData(make_run(two_sets, objective={"random_length_probability": 0.5})).batch(range(64))
    masked = batch.inputs != batch.labels
    supervised = batch.weights > 0
    assert (masked <= supervised).all()  # a mask on the token that has the mask's own id changes nothing
    assert (batch.inputs[supervised] == 3).all()
    ratio = batch.mask_ratio[:, None].expand_as(batch.weights)
    torch.testing.assert_close(batch.weights[supervised], 1 / ratio[supervised])
    assert torch.equal(batch.untruncated, batch.answer)
    tail = torch.arange(64)[None] >= batch.untruncated[:, None]
    assert not supervised[tail].any() and tail.any()
    ends = torch.arange(64) * 64 + batch.untruncated
    assert set(ends.tolist()) <= set(batch.boundaries.tolist())


def test_complementary_masks_are_of_one_window_and_validation_has_none(two_sets, make_run):
    keys = {"mask_ratio_min": 0.2, "mask_ratio_max": 0.8, "epsilon": 0.0, "random_length_probability": 0.0}
    run = make_run(two_sets, objective=keys | {"complementary_masks": True})
    batch, plain = (TrainingData(each).batch(range(16)) for each in (run, make_run(two_sets, objective=keys)))
    assert torch.equal(batch.labels[0::2], batch.labels[1::2])
    assert torch.equal(batch.weights[0::2] > 0, batch.weights[1::2] == 0)
    assert torch.equal(batch.labels[0::2], plain.labels[:8]) and torch.equal(batch.inputs[0::2], plain.inputs[:8])
    torch.testing.assert_close(batch.mask_ratio[0::2] + batch.mask_ratio[1::2], torch.ones(8))
    held_out = [TrainingData(each, "validation") for each in (run, make_run(two_sets, objective=keys))]
    assert equal(*(data.batch(range(4)) for data in held_out))


def test_replaced_tokens_are_other_words_and_all_that_is_shown_is_supervised(two_sets, make_run):
    objective = {"random_length_probability": 0.5}
    operations = {"delete_token_id": 6, "insert_token_id": 7}
    plain = TrainingData(make_run(two_sets, objective=objective)).batch(range(256))
    run = make_run(two_sets, objective=objective | {"replace_ratio": 0.2}, model=operations)
    batch = TrainingData(run).batch(range(256))
    masked = plain.weights > 0
    for name in ("labels", "boundaries", "mask_ratio", "untruncated", "answer"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    assert torch.equal(batch.inputs[masked], plain.inputs[masked])
    assert torch.equal(batch.weights[masked], plain.weights[masked])
    untruncated = torch.arange(64)[None] < batch.untruncated[:, None]
    assert (batch.weights[untruncated & ~masked] == 1).all() and not batch.weights[~untruncated].any()
    replaced = ~masked & (batch.inputs != batch.labels)
    assert not (replaced & ~untruncated).any()
    assert abs(int(replaced.sum()) / int((untruncated & ~masked).sum()) - 0.2) < 0.02
    assert not set(batch.inputs[replaced].tolist()) & {2, 3, 6, 7}
    assert int(batch.inputs[replaced].max()) < 1000 and batch.inputs[replaced].unique().numel() > 500


def test_replaced_tokens_do_not_depend_on_the_rest_of_the_batch_or_on_a_restart(two_sets, make_run):
    run = make_run(two_sets, objective={"replace_ratio": 0.3})
    whole = TrainingData(run).batch(range(40, 56))
    again = TrainingData(run)
    rows = [again.batch([n]) for n in reversed(range(40, 56))][::-1]
    assert torch.equal(whole.inputs, torch.cat([row.inputs for row in rows]))
    validation = [TrainingData(r, "validation").batch(range(8)) for r in (run, make_run(two_sets))]
    assert equal(*validation)


def test_same_numbers_same_batch(two_sets, make_run):
    run = make_run(two_sets, weights=[3, 1], objective={"time_sampling": "stratified"})
    whole = TrainingData(run).batch(range(40, 56))
    again = TrainingData(run)  # a restart
    assert equal(whole, again.batch(range(40, 56)))
    rows = [again.batch([n]) for n in reversed(range(40, 56))][::-1]
    for name in ("inputs", "labels", "weights", "mask_ratio", "untruncated", "answer"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(row, name) for row in rows])), name
    offsets = torch.cat([row.boundaries[1:] + 64 * i for i, row in enumerate(rows)])
    assert torch.equal(whole.boundaries[1:], offsets)


def test_global_batch_size_leaves_uniform_masks_alone(two_sets, make_run):
    small, large = (TrainingData(make_run(two_sets, training={"global_batch_size": g})) for g in (8, 32))
    assert equal(small.batch(range(32)), large.batch(range(32)))


def test_every_window_once_an_epoch_with_new_masks(write_set, make_run):
    data = TrainingData(make_run([write_set("a", [40] * 100)]))
    windows = data.sets[0].windows
    epochs = [[data.locate(e * windows + i) for i in range(windows)] for e in range(2)]
    for number, epoch in enumerate(epochs):
        assert sorted(at.window for at in epoch) == list(range(windows)) and {at.epoch for at in epoch} == {number}
    first = epochs[0][0]
    second = next(at for at in epochs[1] if at.window == first.window)
    one, two = data.batch([first.number]), data.batch([second.number])
    assert torch.equal(one.labels, two.labels) and not torch.equal(one.inputs, two.inputs)


def test_blend_shares(two_sets, make_run):
    data = TrainingData(make_run(two_sets, weights=[3, 1]))
    assert [data.locate(n).set for n in range(400)].count(0) == 300
    assert data.bytes_per_token == pytest.approx(3.0)


def test_seeds_differ_and_validation_does_not_train(two_sets, make_run):
    one, two = (TrainingData(make_run(two_sets, training={"seed": s})).batch(range(8)) for s in (1, 2))
    assert not torch.equal(one.inputs, two.inputs)
    train, validation = (TrainingData(make_run(two_sets), split) for split in ("train", "validation"))
    tokens = [set() for _ in range(2)]
    for seen, data in zip(tokens, (train, validation), strict=True):
        for k, packed in enumerate(data.sets):
            for begin, length in zip(packed._begins, np.diff(packed._offsets), strict=True):
                seen |= {(k, t) for t in range(begin, begin + length)}
    assert tokens[1] and not tokens[0] & tokens[1]


def test_validation_is_stratified_over_the_whole_range(two_sets, make_run):
    objective = {"mask_ratio_min": 0.4, "mask_ratio_max": 0.5, "random_length_probability": 1.0}
    batch = TrainingData(make_run(two_sets, objective=objective), "validation").batch(range(8))
    assert (batch.untruncated == 64).all()
    t = (batch.mask_ratio.double() - 1e-3) / (1 - 1e-3)
    assert sorted((t * 8).int().tolist()) == list(range(8))


@pytest.mark.parametrize("isolate", [True, False])
def test_autoregressive_labels_are_next_tokens_of_the_document(two_sets, make_run, isolate):
    run = make_run(two_sets, objective={"kind": "autoregressive"}, data={"isolate_documents": isolate})
    batch = TrainingData(run).batch(range(12))
    inputs, labels, weights = (x.flatten() for x in (batch.inputs, batch.labels, batch.weights))
    last = {int(b) - 1 for b in batch.boundaries[1:]}
    for i in range(12 * 64):
        assert weights[i] == (i not in last)
        if i not in last:
            assert labels[i] == inputs[i + 1]
    assert not (batch.inputs != batch.labels.roll(1, 1))[:, 1:].any()
    assert batch.untruncated.tolist() == (batch.weights > 0).sum(1).tolist() and (batch.mask_ratio == 1).all()
    assert isolate or len(last) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 999}, "model.vocab_size: 999 .* set model.vocab_size=1000"),
        ({"mask_token_id": 4}, "set model.mask_token_id=3"),
        ({"eos_token_id": 7}, "set model.eos_token_id=2"),
    ],
)
def test_model_of_other_ids(two_sets, make_run, change, message):
    with pytest.raises(ConfigError, match=message):
        TrainingData(make_run(two_sets, model=change))


def test_sets_of_different_tokenizers(write_set, make_run):
    with pytest.raises(DataError, match="different tokenizers"):
        TrainingData(make_run([write_set("a", LENGTHS), write_set("b", LENGTHS, sha256="1" * 64)]))


def test_damaged_sets(write_set):
    prefix = write_set("a.b", LENGTHS)
    binary, index, manifest = (prefix_file(prefix, ending) for ending in (".bin", ".idx", ".json"))
    with pytest.raises(DataError, match=r"none\.json.*llada prepare"):
        read_manifest(prefix.with_name("none"))
    content = binary.read_bytes()
    binary.write_bytes(content[:-2])
    with pytest.raises(DataError, match="truncated"):
        read_manifest(prefix)
    binary.unlink()
    with pytest.raises(DataError, match=r"a\.b\.bin: missing"):
        read_manifest(prefix)
    binary.write_bytes(content)
    index.write_bytes(index.read_bytes()[:40])
    from llada_megatron.llada_moe.data.indexed import TokenFile

    with pytest.raises(DataError, match="damaged index"):
        TokenFile(prefix)
    index.unlink()
    with pytest.raises(DataError, match=r"a\.b\.idx: missing"):
        read_manifest(prefix)
    text = json.loads(manifest.read_text())
    for broken in ("{", json.dumps({"schema": 9}), json.dumps({**text, "tokenizer": {}}), "[]"):
        manifest.write_text(broken)
        with pytest.raises(DataError, match="prepare the set again"):
            read_manifest(prefix)


def test_index_of_other_tokens(write_set):
    from llada_megatron.llada_moe.data.indexed import TokenFile

    one, other = write_set("a", [10, 20]), write_set("b", [10, 30])
    prefix_file(one, ".idx").write_bytes(prefix_file(other, ".idx").read_bytes())
    with pytest.raises(DataError, match="disagree"):
        TokenFile(one)
    prefix_file(other, ".bytes").write_bytes(b"\0" * 8)
    with pytest.raises(DataError, match="not of these documents"):
        TokenFile(other)


@pytest.mark.alone
def test_fast_enough(write_set, make_run):
    """Less than 2 ms for a sequence of 4096 in documents of 20 tokens (best of several: the machine is shared)."""
    run = make_run([write_set("a", [20] * 20_000)], training={"sequence_length": 4096, "global_batch_size": 4})
    data = TrainingData(run)
    times = []
    for step in range(8):
        begin = time.perf_counter()
        data.batch(range(4 * step, 4 * step + 4))
        times.append((time.perf_counter() - begin) / 4)
    assert min(times) < 2e-3 and math.isfinite(min(times))
