"""What inputs mean: files, folders, JSON lines, compression; and what is said about broken ones."""

import gzip
import json
import os

import pytest
import zstandard

from llada_megatron.llada_moe.data import corpus
from llada_megatron.llada_moe.data.corpus import Dropped, chunks, documents
from llada_megatron.llada_moe.data.formats import Reading
from llada_megatron.llada_moe.data.sources import PYTHON_STDLIB, find_sources, stdlib_folder, total_size
from llada_megatron.llada_moe.errors import DataError


def texts(*inputs, key="text"):
    """All documents, and the files passed over."""
    reading, dropped = Reading(key), Dropped()
    sources = find_sources([str(i) for i in inputs], reading)
    return [t for c in chunks(sources, reading) for t in documents(c, reading, dropped)], dropped.files


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def test_folder_in_sorted_order(tmp_path):
    for name, data in {
        "b.txt": b"B", "a/z.md": b"Z", "a/b/c": "é".encode(), ".hidden": b"H", ".git/config": b"G", "empty.txt": b"",
        "__pycache__/x.pyc": b"P", "image.png": b"\x89PNG\0", "latin.txt": b"caf\xe9", "wide.txt": b"w\0i\0",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    found, skipped = texts(tmp_path)
    assert found == ["B", "", "Z", "é"]
    assert {s.name.rpartition("/")[2]: s.reason for s in skipped} == {
        "image.png": "not UTF-8 text: byte 0x89 at offset 0",
        "latin.txt": "not UTF-8 text: byte 0xe9 at offset 3",
        "wide.txt": "not text: byte 0x00 at offset 1",
    }


def test_named_file_that_is_not_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text: byte 0xe9 at offset 3"):
        texts(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        texts(tmp_path / "missing.txt")


def test_compressed_files(tmp_path):
    body, records = "ein Text\n", lines({"text": "x"}, {"text": "y"})
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(body.encode()))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(body.encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(records))
    frames = zstandard.compress(records[:9]) + zstandard.compress(records[9:])
    (tmp_path / "d.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path)[0] == [body, body, "x", "y", "x", "y"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_compressed_file(tmp_path, ending, kind):
    pack = gzip.compress if ending == "gz" else zstandard.compress
    whole = pack(lines(*({"text": os.urandom(20).hex()} for _ in range(100))))
    path = tmp_path / f"x.{kind}.{ending}"
    for data in (b"not packed\n", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            texts(path)


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert texts(tmp_path / "a.txt")[0] == ["x"]


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x", "body": "X"}) + b"\n  \n" + lines({"text": "é", "body": ""}))
    assert texts(tmp_path / "a.jsonl")[0] == ["x", "é"]
    assert texts(tmp_path / "a.jsonl", key="body")[0] == ["X", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"\n', "not JSON"),
        (b'{"text": "\xff"}\n', "not JSON"),
        (b'["x"]\n', "not list"),
        (b'{"body": "x", "id": 1}\n', "no key 'text'; the record has 'body', 'id'"),
        (b'{"text": 3}\n', "'text' is int, not text"),
        (b'{"text": "\\ud800"}\n', "surrogate"),
    ],
)
def test_broken_line_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(corpus, "_CHUNK", 30)
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"text": "fine"}] * 7) + line)
    with pytest.raises(DataError, match=rf"a\.jsonl:8: .*{message}"):
        texts(tmp_path / "a.jsonl")


def test_chunks_account_for_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 50)
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("x" * (i * 10))
    (tmp_path / "l.jsonl").write_bytes(lines(*[{"text": "abc"}] * 20))
    sources = find_sources([str(tmp_path), str(tmp_path / "3.txt")])
    units = list(chunks(sources, Reading()))
    assert len(units) > 8 and sum(u.size for u in units) == total_size(sources)
    assert all(len({s.input for s in u.sources}) == 1 for u in units)
    assert len(texts(tmp_path)[0]) == 29


def test_python_stdlib():
    sources = find_sources([PYTHON_STDLIB])
    names = {s.path.relative_to(stdlib_folder()).as_posix() for s in sources}
    assert {"argparse.py", "json/decoder.py"} <= names and len(names) > 300
    assert not any({"test", "tests", "site-packages"} & set(n.split("/")) or not n.endswith(".py") for n in names)


def test_sample_is_bounded_spread_and_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"{i:05d}" * 100} for i in range(1000))))
    sources = find_sources([str(tmp_path)])
    assert sum(map(len, corpus.sample_texts(sources, Reading()))) == 500_000
    pieces = list(corpus.sample_texts(sources, Reading(), 50_000))
    assert pieces == list(corpus.sample_texts(sources, Reading(), 50_000))
    assert 30_000 < sum(map(len, pieces)) < 70_000
    assert int(pieces[0][:5]) < 100 and int(pieces[-1][:5]) > 900
