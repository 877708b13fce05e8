"""`llada prepare` from the command line: what it writes, says and refuses."""

import errno
import functools
import gzip
import io
import json
import os
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from llada_megatron.cli import main
from llada_megatron.llada_moe.data import encoding
from llada_megatron.llada_moe.data.indexed import TokenWriter
from llada_megatron.llada_moe.data.set_manifest import prefix_file, read_manifest, tokenizer_of

TRAIN = ("--train-tokenizer", "--vocab-size", "320")


@pytest.fixture
def texts(tmp_path):
    """A folder of 30 texts; one holds the mask's name, one is empty, one is not text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(
            f"Text {i}.\n\n" + f"\tThe fox {i} jumps  over the <mask>.\n" * (i % 7 + 1)
        )
    (folder / "empty.txt").touch()
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    return folder


def prepare(*arguments):
    return main(["prepare", *map(str, arguments)])


def content(prefix):
    endings = (".bin", ".idx", ".bytes", ".json", ".tokenizer.model")
    return {ending: prefix_file(prefix, ending).read_bytes() for ending in endings}


def test_set_holds_the_documents(texts, tmp_path, capsys):
    prefix = tmp_path / "out" / "set.v1"
    assert prepare(texts, "--output", prefix, *TRAIN, "--workers", 1, "--json") == 0
    out, err = capsys.readouterr()
    manifest, tokenizer = read_manifest(prefix), tokenizer_of(prefix)
    dataset = IndexedDataset(str(prefix))
    files = sorted(texts.glob("[0-9]*.txt"))
    assert len(dataset) == len(files) == manifest.documents == len(dataset.document_indices) - 1
    for ids, file in zip(dataset, files, strict=True):
        assert ids[-1] == tokenizer.eos_id and tokenizer.mask_id not in ids
        assert tokenizer.decode(ids[:-1].tolist()) == file.read_text()
    assert dataset.index.dtype == np.uint16 and manifest.dtype == "uint16"
    assert manifest.tokens == sum(map(len, dataset)) and manifest.bytes == sum(f.stat().st_size for f in files)
    assert np.fromfile(f"{prefix}.bytes", "<i8").tolist() == [f.stat().st_size for f in files]
    assert [(s.files, s.documents) for s in manifest.sources] == [(31, 30)]
    assert json.loads(out.splitlines()[-1])["tokens"] == manifest.tokens
    assert "model.vocab_size=320 model.mask_token_id=3 model.eos_token_id=2" in out
    assert "passed over 1 files" in err and "image.png (not UTF-8 text: byte 0x89 at offset 0)" in err
    assert "left out 1 empty documents" in err
    assert sorted(p.name for p in prefix.parent.iterdir()) == [
        f"set.v1.{e}" for e in ("bin", "bytes", "idx", "json", "repeats", "tokenizer.model")
    ]


def test_any_number_of_workers_writes_the_same(texts, tmp_path, monkeypatch):
    from llada_megatron.llada_moe.data import corpus

    monkeypatch.setattr(corpus, "_CHUNK", 200)
    (texts / "more.jsonl").write_text("".join(json.dumps({"text": f"line {i}\n" * (i % 5)}) + "\n" for i in range(60)))
    for workers in (1, 3):
        assert prepare(texts, "--output", tmp_path / str(workers) / "set", *TRAIN, "--workers", workers) == 0
    assert content(tmp_path / "1" / "set") == content(tmp_path / "3" / "set")


def test_second_set_with_the_first_ones_tokenizer(texts, tmp_path, capsys):
    assert prepare(texts, "--output", tmp_path / "a", *TRAIN, "--workers", 1) == 0
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"body": "The fox"}\n')
    arguments = (lines, "--output", tmp_path / "b", "--tokenizer", tmp_path / "a.tokenizer.model", "--workers", 1)
    assert prepare(*arguments) == 1
    assert "b.jsonl:1: no key 'text'; the record has 'body'" in capsys.readouterr().err
    assert not list(tmp_path.glob("b.*")) or [p.name for p in tmp_path.glob("b.*")] == ["b.jsonl"]
    assert prepare(*arguments, "--jsonl-key", "body") == 0
    assert read_manifest(tmp_path / "a").tokenizer.sha256 == read_manifest(tmp_path / "b").tokenizer.sha256


def test_broken_records_are_left_out_when_allowed(texts, tmp_path, monkeypatch, capsys):
    from llada_megatron.llada_moe.data import corpus

    monkeypatch.setattr(corpus, "_CHUNK", 100)
    folder = tmp_path / "records"
    folder.mkdir()
    good = '{"text": "The fox"}\n' * 10
    (folder / "a.jsonl").write_text(good + "{broken\n" + good + '{"text": null}\n' + good)
    whole = gzip.compress((good * 1000).encode())
    (folder / "b.jsonl.gz").write_bytes(whole[:-20])  # cut off: what cannot be read on is one broken record
    assert prepare(texts, "--output", tmp_path / "t", *TRAIN, "--workers", 1) == 0
    options = ("--output", tmp_path / "set", "--tokenizer", tmp_path / "t.tokenizer.model", "--workers", 1)
    for allowed, message in ((0, "a.jsonl:11: not JSON"), (1, "a.jsonl:22: 'text' is NoneType"),
                             (2, "cannot be read on: Compressed file ended")):  # fmt: skip
        assert prepare(folder, *options, "--skip-broken", allowed) == 1
        err = capsys.readouterr().err
        assert message in err and (f"more than the {allowed} broken records" in err) == (allowed > 0)
    assert prepare(folder, *options, "--skip-broken", 3) == 0
    err = capsys.readouterr().err
    assert "left out 3 broken records (--skip-broken): " in err and "a.jsonl:11" in err and "b.jsonl.gz:" in err
    assert read_manifest(tmp_path / "set").documents >= 30
    assert prepare(folder, *options, "--skip-broken", -1) == 2


@pytest.mark.parametrize("options", [(), ("--deduplicate",)])
def test_large_text_in_parts_is_the_same_document(texts, tmp_path, monkeypatch, options):
    from llada_megatron.llada_moe.data import corpus, plain_text

    (texts / "05.txt").write_text("".join(f"The fox {i} jumps\n" for i in range(99)))
    (texts / "06.txt").write_bytes(b"long enough\n" * 300 + b"\xff")
    (texts / "07.txt").write_text((texts / "05.txt").read_text() + "and one more line\n")
    assert prepare(texts, "--output", tmp_path / "a" / "set", *TRAIN, "--workers", 1, *options) == 0
    monkeypatch.setattr(corpus, "_LARGE_TEXT", 1000)
    monkeypatch.setattr(plain_text, "BUFFER", 500)
    monkeypatch.setattr(corpus, "text_parts", functools.partial(plain_text.text_parts, limit=150))
    (texts / "05.txt.gz").write_bytes(gzip.compress((texts / "05.txt").read_bytes()))
    (texts / "05.txt").unlink()
    assert prepare(texts, "--output", tmp_path / "b" / "set", *TRAIN, "--workers", 1, *options) == 0
    assert content(tmp_path / "a" / "set") == content(tmp_path / "b" / "set")
    copies = read_manifest(tmp_path / "a" / "set").near_duplicates
    assert copies.dropped == bool(options) and copies.bytes == (texts / "07.txt").stat().st_size


def test_standard_input_with_several_workers(texts, tmp_path, monkeypatch, capsys):
    assert prepare(texts, "--output", tmp_path / "t", *TRAIN, "--workers", 1) == 0
    packed = gzip.compress(b'{"text": "The fox"}\n' * 5)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    options = ("--tokenizer", tmp_path / "t.tokenizer.model", "--workers", 2)
    assert prepare("-", "--output", tmp_path / "set", *options) == 0
    assert read_manifest(tmp_path / "set").documents == 5
    assert "read as JSON lines, by what it holds: standard input" in capsys.readouterr().err
    assert not list(tmp_path.glob(".set*"))


def test_names_that_are_not_utf8(texts, tmp_path, capsys):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/in\xe9")
    os.rename(texts, folder)
    os.rename(f"{folder}/image.png", os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    prefix = os.fsdecode(os.fsencode(tmp_path) + b"/set\xe9")
    assert prepare(folder, "--output", prefix, *TRAIN, "--workers", 1, "--json") == 0
    out, err = capsys.readouterr()
    assert "/in\\xe9/\\xff.png (not UTF-8 text" in err
    assert json.loads(out.splitlines()[-1])["prefix"] == prefix
    manifest = read_manifest(prefix)
    assert manifest.sources[0].input == folder and tokenizer_of(prefix, manifest).vocab_size == 320


def test_hugging_face_tokenizer_without_a_mask(texts, tmp_path, capsys):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert prepare(texts, "--output", tmp_path / "set", "--tokenizer", tmp_path, "--workers", 1) == 0
    assert "no mask token that text cannot produce: id 257 is added" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.tokenizer.file, manifest.tokenizer.mask_id) == ("set.tokenizer.json", 257)
    assert tokenizer_of(tmp_path / "set").vocab_size == 258


def test_existing_set_is_not_touched_unasked(texts, tmp_path, capsys):
    prefix = tmp_path / "set"
    assert prepare(texts, "--output", prefix, *TRAIN, "--workers", 1) == 0
    before = content(prefix)
    (texts / "00.txt").write_text("changed")
    assert prepare(texts, "--output", prefix, *TRAIN, "--workers", 1) == 1
    assert "--overwrite" in capsys.readouterr().err and content(prefix) == before
    assert prepare(texts, "--output", prefix, *TRAIN, "--workers", 1, "--overwrite") == 0
    assert content(prefix) != before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_run_leaves_nothing(texts, tmp_path, monkeypatch, capsys, failure):
    prefix = tmp_path / "out" / "set"
    assert prepare(texts, "--output", prefix, *TRAIN, "--workers", 1) == 0
    before = content(prefix)

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(TokenWriter, "add", fail)
    code = prepare(texts, "--output", prefix, *TRAIN, "--workers", 2, "--overwrite")
    assert code == (130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert content(prefix) == before and len(list(prefix.parent.iterdir())) == 6
    assert isinstance(failure, KeyboardInterrupt) or "disk is full" in capsys.readouterr().err


def test_worker_that_cannot_go_on(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "_start_worker", os.abort)
    assert prepare(texts, "--output", tmp_path / "set", *TRAIN, "--workers", 2) == 1
    assert "a worker process of llada prepare died" in capsys.readouterr().err


def test_empty_corpora(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for arguments in (TRAIN, ("--tokenizer", tmp_path / "t.model")):
        assert prepare(folder, "--output", tmp_path / "set", *arguments) == 1
        assert "empty corpus: no file found" in capsys.readouterr().err
    (folder / "a.txt").touch()
    assert prepare(folder, "--output", tmp_path / "set", *TRAIN) == 1
    assert "no text" in capsys.readouterr().err
    assert not list(tmp_path.glob("*set*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train-tokenizer",), "--train-tokenizer needs --vocab-size"),
        (("--tokenizer", "t.model", "--vocab-size", 300), "--vocab-size goes with --train-tokenizer"),
        ((*TRAIN, "--mask-token", "x"), "go with --tokenizer"),
        ((*TRAIN, "--workers", 0), "at least 1"),
        ((*TRAIN, "--output", "."), "name a prefix"),
    ],
)
def test_options_that_do_not_go_together(texts, tmp_path, capsys, arguments, message):
    assert prepare(texts, "--output", tmp_path / "set", *arguments) == 2
    assert message in capsys.readouterr().err


def test_vocabulary_larger_than_the_corpus_supports(texts, tmp_path, capsys):
    assert prepare(texts, "--output", tmp_path / "set", "--train-tokenizer", "--vocab-size", 50_000) == 1
    assert "the largest it supports is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine.json", "mine.tokenizer.json", "mine.bin"])
def test_a_text_is_not_overwritten_by_its_own_set(texts, tmp_path, capsys, name):
    """Also not in a folder, and not by the tokenizer's copy."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_text("a text of mine\n")
    for source in (folder / name, folder):
        assert prepare(texts, source, "--output", folder / "mine", *TRAIN, "--overwrite", "--workers", 1) == 2
        assert "this command reads" in capsys.readouterr().err
    assert (folder / name).read_text() == "a text of mine\n" and os.listdir(folder) == [name]


def test_a_set_may_replace_its_tokenizer_by_its_copy_only(texts, tmp_path, capsys):
    assert prepare(texts, "--output", tmp_path / "mine", *TRAIN, "--workers", 1) == 0
    tokenizer, manifest = tmp_path / "mine.tokenizer.model", tmp_path / "mine.json"
    before = tokenizer.read_bytes()
    again = (texts, "--output", tmp_path / "mine", "--workers", 1)
    assert prepare(*again, "--tokenizer", tokenizer, "--overwrite") == 0
    assert tokenizer.read_bytes() == before
    for path in tmp_path.glob("mine.*"):
        if path != tokenizer:
            path.unlink()
    assert prepare(*again, *TRAIN) == 1  # a tokenizer of that name is there, and another one would replace it
    assert "mine.tokenizer.model already there" in capsys.readouterr().err
    assert prepare(*again, "--tokenizer", tokenizer) == 0
    manifest.unlink()
    tokenizer.rename(manifest)
    assert prepare(*again, "--tokenizer", manifest, "--overwrite") == 2
    assert manifest.read_bytes() == before
