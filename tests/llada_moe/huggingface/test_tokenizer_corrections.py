"""What an export changes in a tokenizer: names of code, wrong names; and files that are damaged or lead away."""

from __future__ import annotations

import json
import time

import pytest
import tokenizers
from tokenizers import models

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import CheckpointError, DataError
from llada_megatron.llada_moe.huggingface.hub_cache import repository_name, require_own_file
from llada_megatron.llada_moe.huggingface.sentencepiece_conversion import read_model
from llada_megatron.llada_moe.huggingface.tokenizer_export import code_notes, find_tokenizer_files, tokenizer_files
from tests.llada_moe.huggingface.test_tokenizer_export import byte_level, export, loaded, model_for, trained

AUTO_MAP = {"AutoTokenizer": ["someone/repo--tokenization_x.Cls", None]}
CONFIG, NAMES = "tokenizer_config.json", "special_tokens_map.json"


def folder_of(path, kind):
    """A tokenizer's folder: of a tokenizer.json, of a SentencePiece model, or of a vocabulary and merges."""
    path.mkdir()
    if kind == "fast":
        byte_level(path)
    elif kind == "model":
        trained(path).path.rename(path / "tokenizer.model")
    else:
        (path / "vocab.json").write_text("{}")
        (path / "merges.txt").write_text("")
    return path


@pytest.mark.parametrize("kind", ["fast", "model", "slow"])
@pytest.mark.parametrize("given_as", ["folder", "file"])
@pytest.mark.parametrize(
    "code",
    [
        {"auto_map": AUTO_MAP, "tokenizer_class": "Cls"},
        {"auto_map": ["someone/repo--tokenization_x.Cls", None]},
        {"tokenizer_class": "someone/repo--tokenization_x.Cls"},
        {"tokenizer_class": ["tokenization_x.Cls"]},
    ],
)
def test_no_export_names_code(tmp_path, kind, given_as, code):
    source = folder_of(tmp_path / "in", kind)
    (source / CONFIG).write_text(json.dumps({**code, "eos_token": "</s>" if kind == "model" else "<|endoftext|>"}))
    model = load_model("tiny-dense") if kind == "slow" else model_for(load_tokenizer(source))
    file = {"fast": "tokenizer.json", "model": "tokenizer.model", "slow": "vocab.json"}[kind]
    result = export(source if given_as == "folder" else source / file, tmp_path / "out", model)
    for data in result.files.values():
        assert b"auto_map" not in data and b"tokenization_x" not in data and b"Cls" not in data
    assert any(str(source / CONFIG) in note and "names code" in note for note in result.notes)
    assert code_notes(source)
    assert result.loadable == (kind == "fast")
    if kind == "fast":
        assert loaded(tmp_path / "out").mask_token_id == model.mask_token_id


def test_a_class_of_transformers_stays(tmp_path):
    source = folder_of(tmp_path / "in", "slow")
    (source / CONFIG).write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    result = export(source, tmp_path / "out", load_model("tiny-dense"))
    assert result.files[CONFIG] == (source / CONFIG).read_bytes() and result.loadable and not code_notes(source)


@pytest.mark.parametrize("wrong", ["<stop>", {"__type": "AddedToken", "content": "<stop>"}, "not in the vocabulary"])
def test_a_wrong_mask_is_replaced_and_another_end_of_text_told(tmp_path, wrong):
    source = byte_level(tmp_path / "in", ("<|endoftext|>", "<|mask|>", "<stop>")).parent
    model = model_for(load_tokenizer(source))
    named = {"mask_token": wrong, "eos_token": "<stop>", "pad_token": "<stop>"}
    (source / CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    (source / NAMES).write_text(json.dumps(named))
    result = export(source, tmp_path / "out", model)
    theirs = loaded(tmp_path / "out")
    assert (theirs.mask_token_id, theirs.eos_token, theirs.pad_token) == (258, "<stop>", "<stop>")
    assert json.loads(result.files[NAMES])["mask_token"] == "<|mask|>"
    masks = [
        note for note in result.notes if "as the mask, which is not the model's: the export names '<|mask|>'" in note
    ]
    ends = [note for note in result.notes if "'<stop>' (id 259) as the end of text, and the model was trained" in note]
    assert len(masks) == len(ends) == 2 and len(result.notes) == 4


def test_a_wrong_mask_is_removed_where_the_right_one_has_no_name(tmp_path):
    source = byte_level(tmp_path / "in", ("<|endoftext|>", "<|mask|>")).parent
    (source / CONFIG).write_text('{"eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}')
    result = export(source, tmp_path / "out", model_for(load_tokenizer(source), vocab_size=300, mask_token_id=280))
    assert "mask_token" not in json.loads(result.files[CONFIG])
    assert any("the export names none" in note for note in result.notes)
    assert loaded(tmp_path / "out").mask_token is None


@pytest.mark.parametrize("mask", [10, 13])
def test_a_mask_that_cannot_be_named_is_told(tmp_path, mask):
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "a", "b"])} | {"z": 12}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "mine.json"))
    source = tmp_path / "mine.json"
    model = model_for(load_tokenizer(source), vocab_size=20, eos_token_id=1, mask_token_id=mask)
    result = export(source, tmp_path / "out", model)
    assert len(result.notes) == 1 and f"the mask's, {mask}, has no name and is stated in config.json" in result.notes[0]
    assert loaded(tmp_path / "out").mask_token is None


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.json", DEEP),
        ("mine.json", b'{"a": ' + DEEP),
        ("mine.json", b'{"added_tokens": 3}'),
        ("mine.json", b'{"added_tokens": [3]}'),
        ("mine.json", b'{"added_tokens": [{"content": "</s>"}]}'),
        ("mine.json", b'{"added_tokens": [{"content": 5, "special": true}]}'),
        ("mine.json", b'{"added_tokens": [{"id": 0, "special": true}]}'),
        ("mine.json", b"\xff\xfe"),
        ("mine.model", b"\x0a\x02\x08\x01"),  # a piece whose text is an integer
        ("mine.model", b"\x0a\x02\x10\x01"),  # a piece whose score is an integer
        ("mine.model", b"\x08\x01"),  # a piece that is an integer
        ("mine.model", b"\x0a\x05\x0a\x01a\x18\x63"),  # a piece of an unknown kind
        ("mine.model", b"\x80" * 50),
        ("mine.model", b"\x0a\x05\x0a\x01\xff\x18\x03"),  # a control symbol that is no text
        (CONFIG, b"{"),
        (CONFIG, b"[]"),
        (CONFIG, DEEP),
        (NAMES, b"[]"),
        ("tokenizer.json", b'{"added_tokens": 3}'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    if not name.startswith("mine"):
        byte_level(tmp_path / "in")
    path.write_bytes(content)
    source = path if name.startswith("mine") else path.parent
    with pytest.raises(DataError, match=f"^{path}: not "):
        tokenizer_files(source, model_for(load_tokenizer(byte_level(tmp_path / "good"))))
    if name != NAMES:
        with pytest.raises(DataError):
            load_tokenizer(source)


def test_an_endless_integer_takes_no_time():
    start = time.perf_counter()
    with pytest.raises(DataError, match="does not end"):
        read_model(b"\x80" * 2_000_000)
    assert time.perf_counter() - start < 1


def test_links_that_lead_away_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("root")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0f3a"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    byte_level(snapshot).rename(blobs / "1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    template = snapshot / "chat_template.jinja"
    template.symlink_to("tokenizer.json")
    assert find_tokenizer_files(snapshot) == [snapshot / "tokenizer.json", template]
    for target in (secret, "../../../secret", "../0f3a/../../../secret"):
        template.unlink()
        template.symlink_to(target)
        with pytest.raises(DataError, match=f"{template} is a link to {secret}, outside .*: refused.*put the file"):
            tokenizer_files(snapshot, load_model("tiny-dense"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1").write_text("")
    (blobs / "1").unlink()
    blobs.rmdir()
    blobs.symlink_to(tmp_path / "elsewhere")  # blobs that are a link themselves
    with pytest.raises(CheckpointError, match="outside of its directory"):
        require_own_file(snapshot / "tokenizer.json", CheckpointError)
    template.unlink()
    template.symlink_to("chat_template.jinja")
    with pytest.raises(CheckpointError, match=str(template)):
        require_own_file(template, CheckpointError)


def test_a_directory_that_is_a_link_itself_is_read(tmp_path):
    byte_level(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert find_tokenizer_files(tmp_path / "link") == [tmp_path / "link/tokenizer.json"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--inclusionAI--LLaDA2.0-mini/snapshots/0f3a", "inclusionAI/LLaDA2.0-mini"),
        ("hub/models--gpt2/snapshots/0f3a", "gpt2"),
        ("mine/snapshots/0f3a", "0f3a"),
        ("models--a--b/x/y", "y"),
    ],
)
def test_the_name_of_a_repository(tmp_path, path, name):
    assert repository_name(tmp_path / path) == name
