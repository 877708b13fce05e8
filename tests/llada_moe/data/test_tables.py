"""Parquet, Arrow and the folders that `datasets` saves."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from llada_megatron.llada_moe.data.corpus import Dropped, chunks, documents
from llada_megatron.llada_moe.data.formats import Form, Reading
from llada_megatron.llada_moe.data.sources import Notes, find_sources
from llada_megatron.llada_moe.errors import DataError

TEXTS = [f"text {i} é" for i in range(300)]


def read(path, reading=None, notes=None):
    """All documents, the form of the first file, and what was dropped."""
    reading, dropped = reading or Reading(), Dropped()
    sources = find_sources([str(path)], reading, notes=notes)
    return [t for c in chunks(sources, reading) for t in documents(c, reading, dropped)], sources[0].form, dropped


def table(texts=TEXTS, kind=None):
    return pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind)})


def write_arrow(path, new=pyarrow.ipc.new_stream, content=None):
    content = content or table()
    path.parent.mkdir(parents=True, exist_ok=True)
    with new(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=100)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), "str")])
def test_parquet(tmp_path, kind):
    for name in ("a.parquet", "without"):
        pyarrow.parquet.write_table(table(kind=kind), tmp_path / name, row_group_size=70)
        assert read(tmp_path / name)[:2] == (TEXTS, Form.TABLE)


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow(tmp_path, new):
    write_arrow(tmp_path / "a.data", new)
    assert read(tmp_path / "a.data")[:2] == (TEXTS, Form.TABLE)


def test_folder_saved_by_datasets(tmp_path):
    # the layout of DatasetDict.save_to_disk; cached files lie beside the data
    for split, files in {"train": 2, "test": 1}.items():
        folder = tmp_path / "set" / split
        names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
        for name in (*names, "cache-1.arrow"):
            write_arrow(folder / name, content=table([f"{split} {name[:10]}"]))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    notes = Notes()
    assert read(tmp_path, notes=notes)[0] == ["train data-00000", "train data-00001", "test data-00000"]
    assert f"{tmp_path}/set: saved by `datasets`, with train, test; all of it is read" in list(notes.say())
    assert read(tmp_path / "set" / "test")[0] == ["test data-00000"]
    (tmp_path / "set" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: missing"):
        read(tmp_path)


def test_what_a_table_lacks_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table(), path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; there are 'id', 'text' \(--jsonl-key\)"):
        read(path, Reading("body"))
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        read(path, Reading("id"))
    write_arrow(tmp_path / "b.arrow", content=pyarrow.Table.from_arrays([TEXTS, TEXTS], names=["text", "text"]))
    with pytest.raises(DataError, match=r"b\.arrow: 2 columns are called 'text'"):
        read(tmp_path / "b.arrow")
    whole = path.read_bytes()
    for data in (whole[:-20], b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet: record 1: cannot be read on: not Parquet"):
            read(path)
    pyarrow.parquet.write_table(table(["a", None, "b"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2: no text in column 'text'"):
        read(path)
    texts, _, dropped = read(path, Reading(skip_broken=1))
    assert texts == ["a", "b"] and dropped.broken == 1


def test_damaged_offsets_do_not_end_the_process(tmp_path):
    offsets, data = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 5, 3))), pyarrow.py_buffer(b"hello")
    damaged = pyarrow.StringArray.from_buffers(2, offsets, data)
    write_arrow(tmp_path / "a.arrow", content=pyarrow.table({"text": damaged}))
    with pytest.raises(DataError, match=r"a\.arrow: record 1: cannot be read on: .*damaged"):
        read(tmp_path)


def test_without_pyarrow(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: .* needs pyarrow: pip install 'llada-megatron\[parquet\]'"):
        read(tmp_path)
