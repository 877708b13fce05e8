"""Small prepared sets, written without a tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.indexed import TokenWriter
from llada_megatron.llada_moe.data.set_manifest import SetManifest, SourceFacts, TokenizerFacts, prefix_file, to_json

EOS, MASK = 2, 3


@pytest.fixture
def write_set(tmp_path):
    """write_set(name, lengths): documents of these lengths; tokens count up over the whole set, wrapping at 1000."""

    def write(name: str, lengths: list[int], vocab_size: int = 1000, sha256: str = "0" * 64) -> Path:
        prefix = tmp_path / name
        tokens = np.arange(sum(lengths)) % vocab_size
        writer = TokenWriter(prefix, np.uint16)
        writer.add(tokens, lengths, [3 * n for n in lengths])
        writer.finish()
        manifest = SetManifest(
            tokenizer=TokenizerFacts(
                file=f"{name}.tokenizer.model", sha256=sha256, vocab_size=vocab_size, mask_id=MASK, eos_id=EOS
            ),
            documents=len(lengths), tokens=sum(lengths), bytes=3 * sum(lengths), dtype="uint16",
            sources=[SourceFacts(input="x", files=1, documents=len(lengths), bytes=3 * sum(lengths))],
        )  # fmt: skip
        prefix_file(prefix, ".json").write_text(json.dumps(to_json(manifest)))
        return prefix

    return write


@pytest.fixture
def make_run():
    """make_run(prefixes, …): a run over prepared sets; keyword arguments replace keys of its parts."""

    def make(prefixes, weights=None, model=None, training=None, data=None, objective=None) -> RunConfig:
        weights = weights or [1.0] * len(prefixes)
        run = RunConfig(
            model=ModelConfig(
                family="llada", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1,
                num_key_value_heads=1, head_dim=8, vocab_size=1000, max_sequence_length=4096,
                mask_token_id=MASK, eos_token_id=EOS,
            ),
            training=TrainingConfig(steps=10, sequence_length=64, global_batch_size=8, seed=5),
            data=DataConfig(
                sets=[DataSetConfig(path=str(p), weight=w) for p, w in zip(prefixes, weights, strict=True)],
                validation_fraction=0.1,
            ),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
            output_dir="unused",
            objective=ObjectiveConfig(),
        )  # fmt: skip
        return replace(
            run,
            model=replace(run.model, **model or {}),
            training=replace(run.training, **training or {}),
            data=replace(run.data, **data or {}),
            objective=replace(run.objective, **objective or {}),
        )

    return make
