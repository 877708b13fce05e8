"""Which files inputs mean, what is said about the others, and how names that are no text are shown."""

import io
import os
import sys
import threading

import pytest

from llada_megatron.llada_moe.data.formats import Form
from llada_megatron.llada_moe.data.plain_text import read_text
from llada_megatron.llada_moe.data.sources import Notes, find_sources, shown
from llada_megatron.llada_moe.errors import DataError


def said(*inputs, **options):
    notes = Notes()
    found = find_sources([str(i) for i in inputs], notes=notes, **options)
    return found, list(notes.say())


def test_everything_left_out_is_named(tmp_path, monkeypatch):
    for name in ("a.txt", ".env", ".git/config", "__pycache__/x.pyc", "sub/b.txt", "closed/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    scandir = os.scandir

    def closed(path):  # permissions do not bind the superuser, who may be running the tests
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found, notes = said(tmp_path)
    assert [source.path.name for source in found] == ["a.txt", "b.txt"]
    text = "\n".join(notes).replace(f"{tmp_path}/", "")
    assert "because they cannot be read: closed (Permission denied)" in text
    assert "because hidden: .env, __pycache__, .git" in text or "because hidden: .env, .git, __pycache__" in text
    assert "links to folders are not followed: loop" in text and "links to nothing: nowhere" in text
    assert "pipes, sockets or devices: pipe" in text
    with pytest.raises(DataError, match="closed: cannot be read: Permission denied"):
        said(tmp_path / "closed")


def test_standard_input_and_pipes(tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n')))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("from a pipe"))
    writer.start()
    found, notes = said("-", tmp_path / "pipe", spool=spool)
    writer.join(60)
    assert [(source.name, source.form, source.input) for source in found] == [
        ("standard input", Form.LINES, 0), (f"{tmp_path}/pipe", Form.TEXT, 1),
    ]  # fmt: skip
    assert all(source.path.parent == spool and source.named for source in found)
    assert read_text(found[1].path) == "from a pipe"
    assert any("read as JSON lines" in note and "standard input" in note for note in notes)


def test_input_that_is_no_text(tmp_path):
    with pytest.raises(DataError, match="/dev/null: a device or socket"):
        said("/dev/null")
    with pytest.raises(DataError, match="no such file or folder"):
        said(tmp_path / "a\nb")


def test_names_are_shown_without_control_characters(tmp_path):
    assert shown(os.fsdecode(b"a\xe9\n\x1b[31m\xc3\xa9 b")) == "a\\xe9\\n\\x1b[31mé b"
