"""What is in a checkpoint, of whichever kind it is: as JSON values, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llada_megatron.console import size_text
from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.safetensors_reader import pickles
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.parallel.checkpoint.search import find_checkpoints
from llada_megatron.tools.convert.huggingface_source import CONFIG, HuggingFaceSource
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.source import CheckpointSource

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")

_MOE_SIZES = ("num_experts", "top_k", "expert_ffn_hidden_size", "shared_expert_ffn_hidden_size", "leading_dense_layers")


def open_source(path: Path) -> CheckpointSource:
    """Open a Hugging Face directory, a step directory, or the newest whole checkpoint of a run.

    Raises:
        CheckpointError: `path` is none of these, or its configuration or manifest cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give a checkpoint's")
    published = (path / CONFIG).exists() or any(path.glob("*.safetensors*"))
    if published or (pickles(path) and not _is_sharded(path)):
        return HuggingFaceSource(path, require_mask=False)
    return ShardedSource(path)


def describe(source: CheckpointSource) -> dict[str, Any]:
    """What `llada convert inspect` reports of a checkpoint, as JSON values."""
    findings = source.compare()
    count = count_parameters(source.model)
    return {
        "directory": str(source.directory),
        "kind": source.kind,
        "family": source.model.family,
        "model": to_dict(source.model),
        "parameters": count.total,
        "active": count.active,
        "parts": count.parts,
        "dtypes": source.dtypes(),
        "objective": source.objective.kind,
        "block_size": source.objective.block_size,
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
        **source.details(),
        "missing": findings.missing,
        "extra": findings.extra,
        "wrong_shape": findings.misshapen,
        "notes": findings.notes,
        "faults": list(findings.faults()),
    }


def as_text(found: dict[str, Any]) -> str:
    """A report of `describe` as about a dozen lines of text."""
    model = found["model"]
    sizes = ", ".join(f"{key} {model[key]}" for key in _SIZES)
    rows = [("what", found["kind"]), ("family", found["family"]), ("sizes", sizes)]
    if model["moe"]:
        rows.append(("experts", ", ".join(f"{key} {model['moe'][key]}" for key in _MOE_SIZES)))
    attention = found["objective"] + (f", blocks of {found['block_size']}" if found["block_size"] else "")
    rows += [
        ("parameters", f"{found['parameters']:,}, of which one token meets {found['active']:,}"),
        ("dtypes", ", ".join(f"{name}: {count:,}" for name, count in sorted(found["dtypes"].items()))),
        ("trained with", attention),
        ("tokenizer", found["tokenizer"] or "none"),
        ("files", f"{found['files']} with {size_text(found['bytes'])}"),
        *((name, str(value)) for name, value in found["history"].items()),
        *(("note", note) for note in found["notes"]),
        *(("wrong", fault) for fault in found["faults"]),
    ]
    if not found["faults"]:
        rows.append(("tensors", "all there, none too many, every shape right"))
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def _is_sharded(path: Path) -> bool:
    """Whether a directory with pickled files is a sharded checkpoint, or a run with some, and not pickled weights."""
    try:
        return bool(find_checkpoints(path))
    except CheckpointError:
        return any(path.glob("*.distcp"))
