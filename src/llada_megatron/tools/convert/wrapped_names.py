"""Why tensors have other names than those of their model: adapters beside the weights, or the prefix of a wrapper."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|base_model\.model)\.")
_WRAPPERS = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_WRAPPED = re.compile("|".join(rf"(?:(?<=^)|(?<=\.)){re.escape(word)}" for word in _WRAPPERS))
_BACKBONE = "model."
_MERGE = "merge them with peft (`model.merge_and_unload().save_pretrained(OUT)`), and import what that writes"


def adapter_alone(directory: Path, adapter: dict[str, Any]) -> CheckpointError:
    """The error of a directory that holds an adapter and no model: which model it belongs to, and what to do.

    Args:
        adapter: its `adapter_config.json`.
    """
    kind = adapter.get("peft_type") or "LoRA"
    base = adapter.get("base_model_name_or_path") or "a model that it does not name"
    return CheckpointError(
        f"{directory} holds a {kind} adapter of {base} and not a whole model: load that model and the adapter, {_MERGE}"
    )


def explain(missing: Collection[str], extra: Collection[str]) -> str | None:
    """Why tensors that the model needs are missing while others are there, and what to do; None if it is not known.

    Args:
        missing: names of tensors of the model that are not there.
        extra: names of tensors that are no part of the model.
    """
    adapter = next((name for name in extra if _ADAPTER.search(name)), None)
    if adapter is not None:
        return f"there are adapters beside the weights ({adapter}), as peft keeps them: {_MERGE}"
    wanted = set(missing)
    if not wanted:
        return None
    bare = {name: _WRAPPED.sub("", name) for name in extra}
    wrapped = next((name for name in extra if bare[name] != name), "")
    word = _WRAPPED.search(wrapped)
    if word is not None and wanted <= set(bare.values()):
        return (
            f"the names contain {word[0]!r} ({wrapped}), which {_WRAPPERS[word[0]]} puts there: save the weights of "
            "the model inside it, or write the files again with names without it"
        )
    first = next(iter(missing))
    prefix = next((name.removesuffix(first) for name in extra if name.endswith(f".{first}")), None)
    if prefix is not None and all(prefix + name in extra for name in wanted):
        return (
            f"every name begins with {prefix!r}, which a wrapper around the model puts there: save the weights of "
            "the model inside it, or write the files again with names without it"
        )
    if extra and all(_BACKBONE + name in wanted for name in extra):
        return (
            f"no name begins with {_BACKBONE!r}: the weights were saved from the model without its output layer; save "
            "the whole one (AutoModelForCausalLM)"
        )
    return None
