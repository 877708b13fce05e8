"""What a file is found to hold, whatever its name; and what its reader makes of it."""

import gzip
import json
import random

import pytest
import zstandard

from llada_megatron.llada_moe.data.corpus import Dropped, chunks, documents
from llada_megatron.llada_moe.data.formats import Form, Reading, recognise
from llada_megatron.llada_moe.data.json_records import array_elements, lines
from llada_megatron.llada_moe.data.sources import Notes, find_sources
from llada_megatron.llada_moe.errors import DataError

TWO_LINES = b'{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n'
ARRAY = b'\xef\xbb\xbf [\n {"text": "a"},\n {"text": "b"}\n]\n'
PRETTY = b'{\n  "text": "a",\n  "id": 1\n}\n'


def read(path, reading=None, notes=None):
    """All documents of a file or folder."""
    reading, dropped = reading or Reading(), Dropped()
    sources = find_sources([str(path)], reading, notes=notes)
    return [t for c in chunks(sources, reading) for t in documents(c, reading, dropped)]


@pytest.mark.parametrize(
    ("name", "data", "form", "texts"),
    [
        ("part.00000-of-00001.json", TWO_LINES, Form.LINES, ["a", "b"]),
        ("records.txt", TWO_LINES, Form.LINES, ["a", "b"]),
        ("dump", b'\n{"no": 1}\n{"text": "b"}\n', Form.LINES, None),
        ("half.json", b'{"text": "a}\n' + TWO_LINES, Form.LINES, None),
        ("UPPER.JSONL", b"", Form.LINES, []),
        ("one.json", b'{"text": "a"}', Form.LINES, ["a"]),
        ("array.json", ARRAY, Form.ARRAY, ["a", "b"]),
        ("array.jsonl", ARRAY, Form.ARRAY, ["a", "b"]),
        ("pretty.json", PRETTY, Form.OBJECT, ["a"]),
        ("page.md", b"[{link}](to.html)\n", Form.TEXT, ["[{link}](to.html)\n"]),
        ("code.c", b"{\n  return;\n}\n", Form.TEXT, ["{\n  return;\n}\n"]),
        ("words.txt", b"text", Form.TEXT, ["text"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_content_decides(tmp_path, name, data, form, texts, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    found = recognise(path, path.name, Reading(), named=True)
    assert (found.form, found.compressed, found.keyless) == (form, packed, False)
    if texts is None:
        with pytest.raises(DataError, match=rf"{path.name}:[12]: .*--format text"):
            read(path)
    else:
        assert read(path) == texts


def test_what_was_recognised_is_said(tmp_path):
    for name in ("a.json", "b.txt", "c.json", "d.json"):
        (tmp_path / name).write_bytes(TWO_LINES)
    (tmp_path / "e.jsonl").write_bytes(TWO_LINES)
    notes = Notes()
    assert read(tmp_path, notes=notes) == ["a", "b"] * 5
    shown = ", ".join(str(tmp_path / name) for name in ("a.json", "b.txt", "c.json"))
    assert list(notes.say()) == [f"read as JSON lines, by what it holds: {shown} and 1 more"]
    assert read(tmp_path / "a.json", Reading(as_text=True)) == [TWO_LINES.decode()]


@pytest.mark.parametrize(
    "data",
    [b'{"name": "x", "id": 3}', b'{\n"name": "x"\n}', b'[{"id": 1}, {"id": 2}]', b'["a", "b"]', b'{"a": \n', b"[{"],
)
def test_json_without_the_key_in_a_folder_is_text_and_said(tmp_path, data):
    (tmp_path / "package.json").write_bytes(data)
    notes = Notes()
    assert read(tmp_path, notes=notes) == [data.decode()]
    assert "looks like JSON" in "\n".join(notes.say()) and "package.json" in "\n".join(notes.say())


def test_records_without_the_key_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(TWO_LINES.replace(b"text", b"body"))
    for name in (path, tmp_path):
        with pytest.raises(DataError, match=r"a\.json:1: no key 'text'; the record has 'body', 'id' \(--jsonl-key\)"):
            read(name)
    assert read(path, Reading("body")) == ["a", "b"]
    path.write_bytes(b'[{"body": "a"}]')
    with pytest.raises(DataError, match=r"a\.json: record 1: no key 'text'"):
        read(path)


@pytest.mark.parametrize("form", ["lines", "array", "object"])
def test_deep_nesting_is_a_broken_record(tmp_path, form):
    deep = b'{"text": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path = tmp_path / "a.jsonl"
    path.write_bytes({"lines": b'{"text": "ok"}\n' + deep, "array": b'[{"text": "ok"}, ' + deep + b"]",
                      "object": deep}[form])  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl: ?(record )?[12]: .*nested too deeply"):
        read(path)


def test_array_elements_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_megatron.llada_moe.data.json_records._STEP", 3)
    values = [{"text": "é\n]"}, 12345, "x" * 50, [], {"a": [1, {}]}]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n\n")
        with path.open("rb") as stream:
            assert list(array_elements(stream)) == values
    for broken, message in (("[1, 2", "end of the file"), ("[1] x", "'x' after the end"), ("[1 2]", "',' expected"),
                            ("[1, tru]", "Expecting value"), ('["a', "Unterminated")):  # fmt: skip
        path.write_text(broken)
        with path.open("rb") as stream, pytest.raises(ValueError, match=message):
            list(array_elements(stream))


def test_record_too_long_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_megatron.llada_moe.data.json_records.LONGEST_RECORD", 64)
    monkeypatch.setattr("llada_megatron.llada_moe.data.json_records._STEP", 8)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 1000 + b'\n{"text": "b"}\n')
    with path.open("rb") as stream:
        assert list(lines(stream)) == [b'{"text": "a"}\n', None, b'{"text": "b"}\n']
    assert read(path, Reading(skip_broken=1)) == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: a record of more than"):
        read(path)
    path.write_bytes(b'[{"text": "a"}, {"text": "' + b"x" * 1000 + b'"}]')
    with pytest.raises(DataError, match=r"a\.jsonl: record 2: .*more than"):
        read(path)


def test_damaged_files_end_in_documents_or_one_error(tmp_path):
    whole = {"a.jsonl": TWO_LINES * 9, "a.json": ARRAY, "b.json": PRETTY, "a.txt": "text é\n".encode() * 20}
    whole |= {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in whole.items()}
    whole |= {f"{name}.zst": zstandard.compress(data) for name, data in whole.items() if not name.endswith("gz")}
    draw = random.Random(7)
    seen = {"read": 0, "refused": 0}
    for _ in range(400):
        name = draw.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            end = at + draw.choice((0, 1, 1, 20))
            data[at:end] = draw.choice((b"", b"{", b"[", b"\n", b"\0", b"\xff", b'"', b"\\ud800"))
            data = data or bytearray(b"{")
        path = tmp_path / name
        path.write_bytes(data)
        for reading in (Reading(), Reading(skip_broken=100)):
            try:
                read(path, reading)
                seen["read"] += 1
            except DataError as error:
                assert path.name in str(error)
                seen["refused"] += 1
        path.unlink()
    assert min(seen.values()) > 100
