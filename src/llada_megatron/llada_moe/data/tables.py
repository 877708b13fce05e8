"""Texts out of Parquet and Arrow files, and the folders that `datasets` saves. pyarrow is imported when one is met."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llada_megatron.llada_moe.data.streams import compression_of, read_head
from llada_megatron.llada_moe.errors import DataError

_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1\x15", b"ARROW1\0\0", b"\xff\xff\xff\xff"
"""How a Parquet file, an Arrow file and an Arrow stream begin."""

_ROWS = 128
"""Rows that are taken out of a Parquet file at once."""


class DamagedTable(Exception):
    """A file that is not the table that it seems to be, or whose rest cannot be read."""


def begins_table(head: bytes) -> bool:
    """Whether a file with these first bytes is Parquet or Arrow."""
    return head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM))


def table_texts(path: Path, shown: str, key: str) -> Iterator[str | None]:
    """The texts of a column, None where there is none; `shown` is the file's name in messages.

    Raises:
        DataError: there is no such column of text, or pyarrow is not installed.
        DamagedTable: the file cannot be read, or not to its end.
    """
    pyarrow = _pyarrow(shown)
    try:
        head = read_head(path)
        if compression := compression_of(head):
            raise DataError(f"{shown}: a table that was compressed with {compression}: unpack it first")
        if head.startswith((_ARROW_FILE, _ARROW_STREAM)):
            batches = _arrow_batches(pyarrow, path, head.startswith(_ARROW_FILE), shown, key)
        else:
            batches = _parquet_batches(path, shown, key)
        for column in batches:
            column.validate(full=True)  # damaged offsets would end the process when the values are taken out
            yield from column.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedTable(f"not Parquet or Arrow, or damaged ({error})") from error


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The data files of a folder that `datasets` saved, by split; None for another folder.

    `Dataset.save_to_disk` writes state.json, which names the files, `DatasetDict.save_to_disk` dataset_dict.json, which
    names sub-folders of that kind. Raises DataError where these cannot be read.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            names = _json(folder / "dataset_dict.json")["splits"]
            return {str(name): _saved_files(folder / str(name)) for name in names}
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return {folder.name: _saved_files(folder)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: a `datasets` folder whose description cannot be read ({error!r})") from error
    return None


def _saved_files(folder: Path) -> list[Path]:
    """The files of one split in their order."""
    files = [folder / Path(entry["filename"]).name for entry in _json(folder / "state.json")["_data_files"]]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, though state.json beside it names it")
    return files


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _parquet_batches(path: Path, shown: str, key: str) -> Iterator[Any]:
    """The column of a Parquet file in parts."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_column(file.schema_arrow, shown, key)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
            yield batch.column(key)


def _arrow_batches(pyarrow: ModuleType, path: Path, file: bool, shown: str, key: str) -> Iterator[Any]:
    """The column of an Arrow file or stream in the parts in which it was written."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as mapped:
        if file:
            reader = pyarrow.ipc.open_file(mapped)
            _check_column(reader.schema, shown, key)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).column(key)
        else:
            stream = pyarrow.ipc.open_stream(mapped)
            _check_column(stream.schema, shown, key)
            for batch in stream:
                yield batch.column(key)


def _check_column(schema: Any, shown: str, key: str) -> None:
    """The column is there and holds text."""
    from pyarrow import types

    if key not in schema.names:
        raise DataError(f"{shown}: no column {key!r}; there are {', '.join(map(repr, schema.names))} (--jsonl-key)")
    if schema.names.count(key) > 1:
        raise DataError(f"{shown}: {schema.names.count(key)} columns are called {key!r}")
    kind = schema.field(key).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise DataError(f"{shown}: column {key!r} is {kind}, not text")


def _pyarrow(shown: str) -> ModuleType:
    """The library. Raises DataError with what to install."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{shown}: reading Parquet and Arrow needs pyarrow: pip install 'llada-megatron[parquet]'"
        ) from error
    return pyarrow
