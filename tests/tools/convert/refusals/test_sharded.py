"""Sharded checkpoints that an export refuses."""

import pytest

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.tools.convert.inspector import open_source
from tests.tools.convert.checkpoints import bits, tensors_of, to_huggingface
from tests.tools.convert.refusals.refusal import refused


def test_a_damaged_checkpoint_is_not_exported(sharded):
    path = sharded / "checkpoints/step-00000000/__1_0.distcp"
    content = bytearray(path.read_bytes())
    expert = tensors_of("tiny-moe-softmax")["model.layers.3.mlp.experts.7.down_proj.weight"]
    content[content.index(bits(expert)[2]) + 100] ^= 1
    path.write_bytes(content)
    refused(sharded, "__1_0.distcp does not hold the bytes that were written", convert=to_huggingface)
    path.write_bytes(content[:-1])
    refused(sharded, "__1_0.distcp has", "bytes instead of", convert=to_huggingface)
    path.unlink()
    refused(sharded, "__1_0.distcp is missing", convert=to_huggingface)


def test_a_checkpoint_of_another_model_than_it_says(sharded):
    from llada_megatron.parallel.checkpoint import manifest as manifests

    step = sharded / "checkpoints/step-00000000"
    manifest = manifests.read(step)
    manifest.metadata["model"]["num_layers"] = 5
    manifests.write(step, manifest)
    refused(sharded, "9 tensors are missing: decoder.layers.4.", "its manifest describes", convert=to_huggingface)


def test_a_family_without_a_published_format(sharded):
    from llada_megatron.parallel.checkpoint import manifest as manifests

    step = sharded / "checkpoints/step-00000000"
    manifest = manifests.read(step)
    manifest.metadata["model"]["family"] = "qwen3"
    manifests.write(step, manifest)
    refused(sharded, "family qwen3 cannot be exported: no diffusion model is published", convert=to_huggingface)


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint in", "step-… directories", convert=to_huggingface)
    refused(tmp_path / "empty", "config.json is missing")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_source(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a directory: give a checkpoint's"):
        open_source(tmp_path / "absent")
