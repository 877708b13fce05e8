"""Rows of fine-tuning: exactly the answers are learnt, whatever the conversations and however they are packed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.checks import validate_run
from llada_megatron.llada_moe.data.training_data import samples_of
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective
from tests.chats import EOS, MASK, Chat, chat_run, random_chats, write_chats

LENGTH = 64


def open_samples(run, split="train"):
    return samples_of(make_objective(run.objective, run.training), run, split)


def epoch(samples, run):
    """All windows of the first epoch of the one set, in the order of the samples."""
    return samples.batch(range(samples.sets[0].windows * (1 + run.objective.complementary_masks)))


def parts(batch):
    """Each segment of a batch: inputs, labels and weights."""
    flat = [getattr(batch, name).flatten().tolist() for name in ("inputs", "labels", "weights")]
    return [tuple(values[a:b] for values in flat) for a, b in pairwise(batch.boundaries.tolist())]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    pack=st.booleans(),
    padding=st.sampled_from(["none", "block", "batch", "window"]),
    kind=st.sampled_from(["sft", "autoregressive_sft"]),
)
def test_exactly_the_answers_are_learnt(tmp_path_factory, seed, pack, padding, kind):
    hypothesis.assume(not (pack and padding in ("batch", "window")))
    hypothesis.assume(not (kind == "autoregressive_sft" and padding == "block"))
    chats = random_chats(7, seed)
    prefix = write_chats(tmp_path_factory.mktemp("set") / "chats", chats)
    keys = {"answers": "all", "pack": pack, "padding": padding, "normalization": "conversations"}
    if kind == "sft":  # everything that may be masked is
        keys |= {"mask_ratio_min": 0.9999, "epsilon": 0.9999, "block_size": 8 if padding == "block" else None}
    run = chat_run(prefix, LENGTH, 7, kind=kind, **keys)
    batch = epoch(open_samples(run), run)
    longest = max(len(chat.tokens) for chat in chats)
    size = {"none": len, "block": lambda t: -(-len(t) // 8) * 8, "batch": lambda t: longest, "window": lambda t: LENGTH}
    expected = []
    for chat in chats:
        tokens = chat.tokens + [EOS] * (size[padding](chat.tokens) - len(chat.tokens))
        learnt = {i for a, b in chat.answers for i in range(a, b)} | set(range(len(chat.tokens) - 1, len(tokens)))
        expected.append((tuple(tokens), frozenset(learnt)))
    found = []
    for inputs, labels, weights in parts(batch):
        if not any(weights):
            continue  # what is left of a window
        shift = kind == "autoregressive_sft"
        tokens = inputs if shift else labels
        learnt = frozenset(i + shift for i, weight in enumerate(weights) if weight)
        found.append((tuple(tokens), learnt))
        if not shift:
            assert [i for i, token in enumerate(inputs) if token == MASK] == sorted(learnt)
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert int(batch.conversations.sum()) == 7
    assert int(batch.untruncated.sum()) == sum(len(learnt) for _, learnt in expected)


def test_one_answer_an_epoch_each_once_and_nothing_behind_it(tmp_path):
    chats = [dataclasses.replace(chat) for chat in random_chats(12, 3)]
    run = chat_run(write_chats(tmp_path / "chats", chats), LENGTH, 12, padding="none", mask_ratio_min=0.5)
    samples = open_samples(run)
    for document, chat in enumerate(chats):
        turns = []
        for number in range(len(chat.answers)):
            tokens, answer = samples.sets[0].conversation(document, number)
            (stop,) = (b for a, b in chat.answers if a < len(answer) and answer[a])
            assert tokens.tolist() == [*chat.tokens[:stop], EOS]
            assert answer.sum() == next(b - a for a, b in chat.answers if b == stop) + 1
            turns.append(stop)
        assert sorted(turns) == [b for _, b in chat.answers]


@pytest.mark.parametrize("pack", [False, True])
def test_complements_learn_every_answer_token_once(tmp_path, pack):
    chats = random_chats(9, 1)
    keys = {"answers": "all", "complementary_masks": True, "padding": "none", "pack": pack}
    run = chat_run(write_chats(tmp_path / "chats", chats), LENGTH, 6, **keys, normalization="conversations")
    batch = epoch(open_samples(run), run)
    learnt = (batch.weights[0::2] > 0).int() + (batch.weights[1::2] > 0)
    assert set(learnt.unique().tolist()) == {0, 1}
    assert int(learnt.sum()) == sum(b - a for chat in chats for a, b in chat.answers) + 9
    assert torch.equal(batch.labels[0::2], batch.labels[1::2])
    torch.testing.assert_close(batch.mask_ratio[0::2] + batch.mask_ratio[1::2], torch.ones(len(batch.labels) // 2))


def test_blocks_are_learnt_beside_the_clean_conversation(tmp_path):
    keys = {"answers": "all", "pack": True, "padding": "block", "block_size": 8}
    run = chat_run(write_chats(tmp_path / "chats", random_chats(9, 1)), LENGTH, 3, **keys)
    blocks = dataclasses.replace(run, objective=dataclasses.replace(run.objective, kind="block_diffusion_sft"))
    alone, both = (epoch(open_samples(each), each) for each in (run, blocks))
    for name in ("inputs", "labels", "weights"):
        assert torch.equal(getattr(both, name)[:, :LENGTH], getattr(alone, name))
    assert torch.equal(both.inputs[:, LENGTH:], alone.labels) and not both.weights[:, LENGTH:].any()
    assert not (both.inputs[:, LENGTH:] == MASK).any() and (both.inputs[:, :LENGTH] == MASK).any()
    objective = make_objective(blocks.objective, blocks.training)
    assert objective.pattern(0) == AttentionPattern(8, doubled=True) and objective.copies == 2
    assert objective.sampling_pattern(0) == AttentionPattern(8)


def test_weights_of_each_normaliser_and_of_validation(tmp_path):
    chats = random_chats(40, 5)
    prefix = write_chats(tmp_path / "chats", chats)
    batches = {}
    for name, keys in {
        "plain": {"normalization": "conversations"},
        "length": {"normalization": "answer_length"},
        "uniform": {"normalization": "masked_tokens", "weighting": "none"},
    }.items():
        run = chat_run(prefix, LENGTH, 8, padding="batch", held_out=0.2, mask_ratio_min=0.3, mask_ratio_max=0.8, **keys)
        batches[name] = open_samples(run).batch(range(32))
        held = open_samples(run, "validation").batch(range(8))
        assert float(held.mask_ratio.min()) < 0.3 and float(held.mask_ratio.max()) > 0.8  # the whole range
        masked = held.weights > 0
        torch.testing.assert_close(held.weights[masked], (1 / held.mask_ratio)[:, None].expand(8, LENGTH)[masked])
    plain, length, uniform = batches["plain"], batches["length"], batches["uniform"]
    torch.testing.assert_close(plain.weights, length.weights * length.answer[:, None])
    assert torch.equal(uniform.weights, (plain.weights > 0).float())
    assert float(plain.mask_ratio.min()) >= 0.3 and float(plain.mask_ratio.max()) <= 0.8 + 1e-3


def test_long_conversations_are_counted_and_cut_or_left_out(tmp_path):
    fits, cut = Chat([5, 6, 7, EOS], [(1, 3)]), Chat([*range(20), EOS], [(4, 20)])
    late = Chat([*range(30), EOS], [(20, 30)])
    prefix = write_chats(tmp_path / "chats", [fits, cut, late])
    run = chat_run(prefix, 16, 2, answers="all", padding="none")
    samples = open_samples(run)
    assert samples.sets[0].documents.tolist() == [0, 1]
    tokens, answer = samples.sets[0].conversation(1, 0)
    assert tokens.tolist() == list(range(16)) and answer.tolist() == [i >= 4 for i in range(16)]
    (remark,) = samples.remarks()
    assert "2 of 3 conversations (train) are longer than training.sequence_length 16: their ends are cut off" in remark
    dropped = open_samples(dataclasses.replace(run, objective=dataclasses.replace(run.objective, too_long="drop")))
    assert dropped.sets[0].documents.tolist() == [0] and "they are left out" in dropped.remarks()[0]
    with pytest.raises(DataError, match="has none that fits a window of 2 tokens with an answer"):
        open_samples(chat_run(write_chats(tmp_path / "late", [late]), 2, 1))


def test_packed_windows_hold_each_conversation_once(tmp_path):
    chats = random_chats(50, 8)
    run = chat_run(write_chats(tmp_path / "chats", chats), 128, 4, answers="all", pack=True, padding="none")
    chat_set = open_samples(run).sets[0]
    members = [i for window in range(chat_set.windows) for i in chat_set.members(window)]
    assert sorted(chat_set.documents[members].tolist()) == list(range(50))
    assert chat_set.documents.tolist() != list(range(50))
    for window in range(chat_set.windows):
        assert sum(len(chats[d].tokens) for d in chat_set.documents[list(chat_set.members(window))]) <= 128


def test_a_packed_conversation_gets_another_stratum_in_each_epoch(tmp_path, monkeypatch):
    keys = {"pack": True, "padding": "none", "time_sampling": "stratified"}
    run = chat_run(write_chats(tmp_path / "chats", random_chats(16, 8)), 128, 8, **keys)
    samples = open_samples(run)
    make, strata = samples._make, {}

    def noted(tokens, answer, at):
        made = make(tokens, answer, at)
        time = (made.mask_ratio - run.objective.epsilon) / (1 - run.objective.epsilon)
        strata.setdefault(at.window, []).append(int(8 * time))
        return made

    monkeypatch.setattr(samples, "_make", noted)
    samples.batch(range(10 * samples.sets[0].windows))
    assert len(strata) == 16 and all(len(drawn) == 10 and len(set(drawn)) > 2 for drawn in strata.values())
    for drawn in zip(*strata.values(), strict=True):  # an epoch has each stratum twice
        assert sorted(drawn) == [stratum for stratum in range(8) for _ in range(2)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pack": True}, "objective.padding: batch with pack fills every window"),
        ({"padding": "block"}, "objective.padding: block without objective.block_size"),
        ({"random_length_probability": 0.1}, "objective.random_length_probability: 0.1 would cut conversations"),
        ({"replace_ratio": 0.1}, "objective.replace_ratio: 0.1 with kind sft"),
        ({"complementary_masks": True, "mask_ratio_min": 0.3, "mask_ratio_max": 0.8}, "objective.complementary_masks"),
        ({"kind": "block_diffusion_sft"}, "objective.block_size: null, but kind block_diffusion_sft needs"),
        ({"kind": "block_diffusion_sft", "block_size": 64}, "objective.block_size: 64 is not a part of"),
        ({"confidence_coefficient": -1.0}, "objective.confidence_coefficient: -1.0 must be at least 0"),
        ({"kind": "autoregressive_sft", "complementary_masks": True}, "objective.complementary_masks"),
        ({"kind": "autoregressive_sft", "confidence_coefficient": 1.0}, "objective.confidence_coefficient"),
        ({"kind": "autoregressive_sft", "weighting": "none"}, "which has no mask ratio"),
        ({"kind": "autoregressive_sft", "block_size": 4}, "objective.block_size: 4"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, keys, said):
    with pytest.raises(ConfigError) as caught:
        validate_run(chat_run(tmp_path / "none", **keys))
    assert said in str(caught.value)


def test_sets_and_runs_that_cannot_be_fine_tuned_on(tmp_path):
    prefix = write_chats(tmp_path / "chats", random_chats(4, 0))
    run = chat_run(prefix)
    with pytest.raises(ConfigError, match=r"data\.isolate_documents: false"):
        open_samples(dataclasses.replace(run, data=dataclasses.replace(run.data, isolate_documents=False)))
    (tmp_path / "chats.answers").write_bytes(np.zeros(2, "<i8").tobytes())
    with pytest.raises(DataError, match=r"chats\.answers: missing or not of this manifest"):
        open_samples(run)
