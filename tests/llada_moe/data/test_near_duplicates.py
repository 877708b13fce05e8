"""Near-duplicates in `llada prepare`: counted, dropped when asked, and never on both sides of the split."""

import json
import random

import numpy as np
import pytest

from llada_megatron.cli import main
from llada_megatron.llada_moe.data import near_duplicates, sentencepiece_tokenizer
from llada_megatron.llada_moe.data.indexed import TokenFile
from llada_megatron.llada_moe.data.packing import PackedDataset, held_out
from llada_megatron.llada_moe.data.set_manifest import prefix_file, read_manifest, read_repeats, tokenizer_of
from llada_megatron.llada_moe.evaluation.near_duplicate_share import near_duplicate_share

FRACTION = 0.4
COUNT = 40


def document(number):
    words = random.Random(number)
    return " ".join("".join(words.choices("abcdefghijkl", k=4)) for _ in range(60))


@pytest.fixture
def corpus(tmp_path):
    """40 documents: 10, 11, 12 … repeat 0, 1, 2 … with a word changed."""
    texts = [document(number) for number in range(COUNT)]
    for number in range(10, 20):
        texts[number] = texts[number - 10].replace(" ", " changed ", 1)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts]))
    return path, texts


def prepare(corpus, prefix, *options):
    arguments = [str(corpus), "--output", str(prefix), "--train-tokenizer", "--vocab-size", "300", "--workers", "1"]
    return main(["prepare", *arguments, "--validation-fraction", str(FRACTION), *map(str, options)])


def decoded(prefix):
    tokenizer, file = tokenizer_of(prefix), TokenFile(prefix)
    return [
        tokenizer.decode(file.tokens[first : first + length].tolist())
        for first, length in map(file.span, range(file.documents))
    ]


def split(prefix, name):
    manifest = read_manifest(prefix)
    return PackedDataset(prefix, 16, name, FRACTION, 0, True, read_repeats(prefix, manifest))


def test_held_out_documents_repeat_no_other(corpus, tmp_path, capsys):
    path, texts = corpus
    assert prepare(path, tmp_path / "set") == 0
    assert "near-duplicates: 10 of 40 documents" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.near_duplicates.documents, manifest.near_duplicates.never_held_out) == (10, 20)
    assert manifest.near_duplicates.bytes == sum(len(text) for text in texts[10:20]) and manifest.documents == COUNT
    train, validation = (split(tmp_path / "set", name) for name in ("train", "validation"))
    expected = {number for number in held_out(0, COUNT, FRACTION).tolist() if number >= 20}
    assert set(validation._held.tolist()) == expected and len(expected) > 3
    assert train.documents == COUNT - len(expected) and near_duplicate_share([train], [validation]) == 0.0
    assert train.tokens + validation.tokens == manifest.tokens and train.bytes + validation.bytes == manifest.bytes


def test_without_the_check_the_measure_tells(corpus, tmp_path, capsys):
    assert prepare(corpus[0], tmp_path / "set", "--no-near-duplicate-check") == 0
    assert "near-duplicates" not in capsys.readouterr().err
    assert read_manifest(tmp_path / "set").near_duplicates is None
    assert not prefix_file(tmp_path / "set", ".repeats").exists()
    train, validation = (split(tmp_path / "set", name) for name in ("train", "validation"))
    copies = sum(
        size
        for number, (_, size) in zip(validation._held, validation.each_document(), strict=True)
        if number < 20 and (number + 10 if number < 10 else number - 10) not in validation._held
    )
    assert copies and near_duplicate_share([train], [validation]) == pytest.approx(copies / validation.bytes)


def test_dropped_ones_are_gone_and_the_first_stays(corpus, tmp_path, capsys):
    path, texts = corpus
    assert prepare(path, tmp_path / "set", "--deduplicate") == 0
    assert "dropped; 0 documents" in capsys.readouterr().err
    assert decoded(tmp_path / "set") == texts[:10] + texts[20:]
    manifest = read_manifest(tmp_path / "set")
    assert manifest.documents == manifest.sources[0].documents == 30 and manifest.near_duplicates.dropped
    assert manifest.bytes == sum(len(text.encode()) for text in texts[:10] + texts[20:])


def test_dropped_ones_do_not_depend_on_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_WORTH_A_PROCESS", 0)
    monkeypatch.setattr("llada_megatron.llada_moe.data.corpus._CHUNK", 1000)
    for workers in (1, 2):
        assert prepare(corpus[0], tmp_path / f"{workers}" / "set", "--deduplicate", "--workers", workers) == 0
    for ending in (".bin", ".idx", ".bytes", ".repeats", ".json"):
        one, two = (prefix_file(tmp_path / name / "set", ending).read_bytes() for name in "12")
        assert one == two


@pytest.mark.parametrize("options", [(), ("--deduplicate",), ("--no-near-duplicate-check",)])
def test_vocabulary_knows_no_held_out_text(corpus, tmp_path, monkeypatch, options):
    seen, train_on = [], sentencepiece_tokenizer.train_sentencepiece

    def train(texts, size, path):
        seen.extend(texts)
        return train_on(seen, size, path)

    monkeypatch.setattr(sentencepiece_tokenizer, "train_sentencepiece", train)
    assert prepare(corpus[0], tmp_path / "set", *options) == 0
    packed, all_texts = split(tmp_path / "set", "validation"), decoded(tmp_path / "set")
    held = set(packed._held.tolist())
    assert held and seen == [text for number, text in enumerate(all_texts) if number not in held]
    assert read_manifest(tmp_path / "set").vocabulary_held_out == FRACTION


def test_inputs_that_change_while_they_are_read(corpus, tmp_path, monkeypatch, capsys):
    find = near_duplicates.find_near_duplicates

    def then_change(*arguments):
        found = find(*arguments)
        with corpus[0].open("a") as lines:
            lines.write('{"text": "one more"}\n')
        return found

    monkeypatch.setattr(near_duplicates, "find_near_duplicates", then_change)
    assert prepare(corpus[0], tmp_path / "set") == 1
    assert "changed while they were read (first 40 documents, then 41)" in capsys.readouterr().err
    assert not list(tmp_path.glob("set*"))


def test_a_corpus_of_copies_has_nothing_to_hold_out(tmp_path, capsys):
    path = tmp_path / "same.jsonl"
    path.write_text((json.dumps({"text": document(1)}) + "\n") * COUNT)
    assert prepare(path, tmp_path / "set") == 0
    with pytest.raises(Exception, match=r"of 40 documents, 40 that repeat others left out\) holds 0"):
        split(tmp_path / "set", "validation")


def test_overwriting_leaves_no_list_of_another_set(corpus, tmp_path):
    assert prepare(corpus[0], tmp_path / "set") == 0
    assert len(np.fromfile(tmp_path / "set.repeats", "<i8")) == 20
    assert prepare(corpus[0], tmp_path / "set", "--overwrite", "--no-near-duplicate-check") == 0
    assert not (tmp_path / "set.repeats").exists()


def test_list_that_is_missing_or_of_another_set(corpus, tmp_path):
    assert prepare(corpus[0], tmp_path / "set") == 0
    for damage in (lambda p: p.write_bytes(b"\0" * 8), lambda p: p.unlink()):
        damage(tmp_path / "set.repeats")
        with pytest.raises(Exception, match=r"set\.repeats: missing or not of this manifest"):
            split(tmp_path / "set", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--deduplicate", "--no-near-duplicate-check"), "not allowed with"),
        (("--validation-fraction", 1.0), "at least 0 and less than 1"),
    ],
)
def test_options_that_cannot_be(corpus, tmp_path, capsys, options, message):
    try:
        assert prepare(corpus[0], tmp_path / "set", *options) == 2
    except SystemExit as stopped:  # argparse
        assert stopped.code == 2
    assert message in capsys.readouterr().err
