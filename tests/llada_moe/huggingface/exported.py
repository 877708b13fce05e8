"""Directories as an export makes them, with random weights, and how transformers opens them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.huggingface.formats import export_format, modeling_files
from llada_megatron.llada_moe.huggingface.formats.table import write_config


@contextmanager
def modules_in(folder: Path) -> Iterator[None]:
    """Where transformers copies the code it runs; nothing of it is left in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
                del sys.modules[name]


def write_without_weights(folder: Path, model: ModelConfig) -> Path:
    table = export_format(model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(table, model)))
    for file in modeling_files(table.exports.folder):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def random_peer(folder: Path, model: ModelConfig):
    import transformers

    config = transformers.AutoConfig.from_pretrained(write_without_weights(folder, model), trust_remote_code=True)
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    for name, tensor in peer.state_dict().items():
        tensor.add_(torch.randn_like(tensor) * (0.2 if tensor.dim() == 1 else 0.05))
        assert tensor.dtype is torch.float32, name
    return peer


def load(folder: Path, **options):
    import transformers

    peer, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(found.values()), found
    return peer


def same_weights(peer, other) -> bool:
    """Bit for bit (logits may differ in the last bit with where the weights lie in memory)."""
    a, b = peer.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
