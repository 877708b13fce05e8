"""The checkpoint formats that can be read, and which of them a directory holds."""

from __future__ import annotations

from pathlib import Path

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.formats.bailing import BAILING, BAILING_V2
from llada_megatron.llada_moe.huggingface.formats.llada import LLADA
from llada_megatron.llada_moe.huggingface.formats.llada2 import LLADA2
from llada_megatron.llada_moe.huggingface.formats.llada_moe import LLADA_MOE
from llada_megatron.llada_moe.huggingface.formats.llama import LLAMA
from llada_megatron.llada_moe.huggingface.formats.qwen3 import QWEN3, QWEN3_MOE
from llada_megatron.llada_moe.huggingface.formats.table import Config, Format, write_config

FORMATS: tuple[Format, ...] = (LLADA, LLADA_MOE, LLADA2, BAILING_V2, BAILING, LLAMA, QWEN3, QWEN3_MOE)


def find_format(config: Config, file: str) -> Format:
    """The format of a checkpoint with this `config.json`.

    Raises:
        CheckpointError: the `model_type` is unknown (the message lists the known ones), or stands for several formats,
            of which none or more than one fits.
    """
    kind = config.get("model_type")
    fitting = [table for table in FORMATS if kind in (table.model_type, *table.other_model_types)]
    marked = [table for table in fitting if table.marker is None or config.get(table.marker) is not None]
    if len(marked) == 1:
        return marked[0]
    if fitting:
        ways = "; ".join(f"{table.title} has the key {table.marker!r}" for table in fitting)
        which = "more than one fits" if marked else "none fits"
        raise CheckpointError(f"{file}: model_type {kind!r} stands for several formats, and {which} ({ways})")
    known = ", ".join(f"{table.model_type} ({table.title})" for table in FORMATS)
    raise CheckpointError(f"{file}: unknown model_type {kind!r}; known are: {known}")


def export_format(model: ModelConfig) -> Format:
    """The format in which a model of this family is published.

    Raises:
        CheckpointError: the family can only be imported.
    """
    tables = [table for table in FORMATS if table.implied["family"] == model.family]
    for table in tables:
        if table.exports is not None:
            return table
    raise CheckpointError(f"a model of family {model.family} cannot be exported: {tables[0].why_not_exported}")


def export_obstacle(model: ModelConfig) -> str | None:
    """Why a model cannot be exported to the format of its family, or None if it can."""
    try:
        write_config(export_format(model), model)
    except CheckpointError as error:
        return str(error)
    return None


_ROOT = Path(__file__).parents[1] / "modeling"


def modeling_files(folder: str) -> list[Path]:
    """The modelling files of an export: those in `modeling/<folder>` and the one that all formats share."""
    return sorted([*(_ROOT / folder).glob("*.py"), *(_ROOT / "common").glob("*.py")])
