"""A checkpoint made by transformers comes back from sharded files as the same model, there and here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.tools.bench.layouts import MODELS
from llada_megatron.tools.convert import parse_layout
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint
from llada_megatron.tools.convert.importer import ImportOptions, import_checkpoint
from tests.llada_moe.huggingface.exported import load, modules_in, random_peer, same_weights

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "dense": "tensor_parallel=2,pipeline_parallel=2",
    "tied": "pipeline_parallel=2",
    "softmax": "tensor_parallel=2,expert_parallel=2",
    "sigmoid": "expert_parallel=4",
    "blocks": "tensor_parallel=2,expert_parallel=2",
}
SEQ = 40


@pytest.fixture(scope="module", autouse=True)
def cache_of_modules(tmp_path_factory):
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


def there_and_back(folder: Path, case: str, dtype: torch.dtype | None = None) -> tuple[Path, Path]:
    """The sharded checkpoint and the export of a random model."""
    random_peer(folder / "random", MODELS[case]).save_pretrained(folder / "random")
    import_checkpoint(folder / "random", folder / "sharded", ImportOptions(layout=parse_layout(LAYOUTS[case])))
    options = ExportOptions(dtype=dtype, shard_bytes=100_000, without_tokenizer=True)
    export_checkpoint(folder / "sharded", folder / "exported", options)
    return folder / "sharded", folder / "exported"


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_logits_are_the_same_in_all_three(tmp_path, case):
    sharded, exported = there_and_back(tmp_path, case)
    tokens = torch.randint(0, 120, (2, SEQ), generator=torch.Generator().manual_seed(1))
    peer = load(exported)
    assert same_weights(peer, load(tmp_path / "random"))
    with open_checkpoint(sharded) as loaded:
        ours = loaded.logits(tokens, torch.ones_like(tokens, dtype=torch.bool), whole_sequences(2, SEQ))
        block_size = loaded.run.objective.block_size
    assert block_size == {"sigmoid": 32, "blocks": 5}.get(case)
    blocks = torch.arange(SEQ) // (block_size or SEQ)
    theirs = peer(tokens, attention_mask=(blocks[:, None] >= blocks)[None, None]).logits
    torch.testing.assert_close(theirs, ours.view_as(theirs), atol=1e-5, rtol=0)


def test_an_export_in_bfloat16_keeps_the_expert_bias_in_float32(tmp_path):
    _, exported = there_and_back(tmp_path, "sigmoid", torch.bfloat16)
    exact, rounded = load(tmp_path / "random").state_dict(), load(exported, dtype="auto").state_dict()
    for name, tensor in rounded.items():
        bias = name.endswith("expert_bias")
        assert tensor.dtype is (torch.float32 if bias else torch.bfloat16), name
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
