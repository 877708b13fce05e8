"""The peers' samplers: run from clones, on our weights, with their work counted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import import_peers, load_peers
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.tools.bench.sampling.language import Language
from llada_megatron.tools.bench.sampling.models import Recipe, train_or_find
from tests.benchmarks.clones import write_clones

RECIPE = Recipe(
    steps=1, learning_rate=1e-2, num_layers=2, hidden_size=64, ffn_hidden_size=96, heads=4, sequences=2, warmup_steps=0
)
PROMPT = Language().example(0).prompt
CLONES = os.environ.get("LLADA_PEERS", "")


@pytest.fixture
def clones(tmp_path):
    pytest.importorskip("transformers")
    return write_clones(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_or_find(tmp_path_factory.mktemp("models"), RECIPE)


def ours(model, tokens):
    with open_checkpoint(model) as loaded:
        rows = torch.ones_like(tokens, dtype=torch.bool)
        return loaded.logits(tokens, rows, whole_sequences(*tokens.shape))


def test_the_peers_run_our_weights_and_their_work_is_counted(clones, model):
    peers = load_peers(clones, model)
    tokens = torch.tensor([PROMPT + [RECIPE.language.mask_id] * 16])
    expected = ours(model, tokens)
    torch.testing.assert_close(peers.logits(tokens)[0], expected, atol=1e-4, rtol=0)
    for generated in (
        peers.llada(PROMPT, new_tokens=16),
        peers.fast_dllm(PROMPT, cache="dual", threshold=0.9, new_tokens=16),
    ):
        assert generated.tokens == expected[len(PROMPT) :].argmax(-1).tolist()
        assert generated.work.forwards == 2
        assert generated.work.positions == generated.work.logit_rows == tokens.numel() + 7
    assert "model" not in sys.modules  # their name for a folder of theirs


def test_a_version_without_the_factor_rule_is_said(clones, model):
    peers = load_peers(clones, model)
    assert not peers.has_factor
    with pytest.raises(ResourceError, match="git pull"):
        peers.fast_dllm(PROMPT, factor=1.0)


def test_a_newer_layout_of_folders_is_found(clones):
    (clones / "Fast-dLLM" / "llada").rename(clones / "Fast-dLLM" / "inner")
    (clones / "Fast-dLLM" / "v1").mkdir()
    (clones / "Fast-dLLM" / "inner").rename(clones / "Fast-dLLM" / "v1" / "llada")
    assert "v1" in import_peers(clones).fast_dllm.__file__


@pytest.mark.parametrize("name", ["Fast-dLLM", "LLaDA"])
def test_a_missing_clone_is_said_with_what_to_run(clones, name):
    (clones / name).rename(clones / "elsewhere")
    with pytest.raises(ResourceError, match=rf"git clone https://github.com/\S+/{name} {clones / name}"):
        import_peers(clones)


def test_a_missing_package_is_said_with_what_to_install(clones):
    path = clones / "Fast-dLLM" / "llada" / "generate.py"
    path.write_text("import a_package_that_is_not_there\n" + path.read_text())
    with pytest.raises(ResourceError, match="pip install a_package_that_is_not_there"):
        import_peers(clones)


@pytest.mark.skipif(not CLONES, reason="LLADA_PEERS names no folder with clones of Fast-dLLM and LLaDA")
def test_the_real_peers_agree_with_our_logits_and_with_each_other(model):
    peers = load_peers(Path(CLONES), model)
    tokens = torch.tensor([PROMPT + [RECIPE.language.mask_id] * 128])
    torch.testing.assert_close(peers.logits(tokens)[0], ours(model, tokens), atol=1e-4, rtol=0)
    theirs = [peers.llada(PROMPT, steps=16), peers.fast_dllm(PROMPT, steps=16)]
    assert theirs[0].tokens == theirs[1].tokens
    assert [generated.work.forwards for generated in theirs] == [16, 16]
    cached = peers.fast_dllm(PROMPT, cache="dual", steps=16).work
    assert (cached.forwards, cached.positions) == (16, 4 * tokens.numel() + 12 * 32)
