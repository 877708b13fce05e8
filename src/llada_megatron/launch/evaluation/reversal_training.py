"""The runs of the reversal benchmark: a prepared set of made-up facts, and models that are trained on it alike."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.evaluation.reversal_facts import PAIRS, ReversalFacts, make_facts
from llada_megatron.llada_moe.evaluation.reversal_figures import AUTOREGRESSIVE, DIFFUSION, WHOLE_NAMES

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.parallel.evaluation.reversal_answers import Answer

_KINDS = {AUTOREGRESSIVE: "autoregressive", DIFFUSION: "diffusion", WHOLE_NAMES: "whole_word_diffusion"}


@dataclass(frozen=True)
class ReversalRecipe:
    """All that decides the models of a seed."""

    pairs: int = PAIRS
    steps: int = 1100
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    sequences: int = 256
    """Facts of a step."""
    length: int = 11
    """Positions of a fact, filled up with end-of-text tokens."""
    learning_rate: float = 8e-3
    weight_decay: float = 0.1

    def run(self, arm: str, seed: int, set_prefix: Path, output: Path, vocabulary: Tokenizer) -> RunConfig:
        """The configuration of a training, as `llada train` would read it."""
        from llada_megatron.llada_moe.config import from_dict, validate_run
        from llada_megatron.llada_moe.config.run import RunConfig

        values: dict[str, Any] = {
            "model": {
                "family": "llada",
                "num_layers": self.layers,
                "hidden_size": self.hidden,
                "ffn_hidden_size": 3 * self.hidden,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                "head_dim": self.hidden // self.heads,
                "vocab_size": -(-vocabulary.vocab_size // 64) * 64,
                "max_sequence_length": 64,
                "mask_token_id": vocabulary.mask_id,
                "eos_token_id": vocabulary.eos_id,
                "rope_theta": 10000.0,
            },
            "training": {
                "steps": self.steps,
                "sequence_length": self.length,
                "global_batch_size": self.sequences,
                "micro_batch_size": self.sequences,
                "precision": "fp32",
                "seed": seed,
            },
            "objective": {"kind": _KINDS[arm], "random_length_probability": 0.0},
            "data": {
                "sets": [{"path": str(set_prefix)}],
                "validation_fraction": 0.0,
                "isolate_documents": False,
            },
            "optimizer": {
                "learning_rate": {
                    "peak": self.learning_rate,
                    "warmup_steps": self.steps // 20,
                    "decay_steps": self.steps // 2,
                    "decay_shape": "cosine",
                },
                "weight_decay": self.weight_decay,
            },
            "checkpoint": {"interval": self.steps},
            "logging": {"interval": 100, "tensorboard": False},
            "output_dir": str(output),
        }
        if arm != AUTOREGRESSIVE:
            values["objective"]["time_sampling"] = "stratified"
        run = from_dict(RunConfig, values)
        validate_run(run)
        return run


def prepare_facts(facts: ReversalFacts, prefix: Path, length: int) -> None:
    """Write a prepared set, a document for each text, filled up with end-of-text tokens to `length`."""
    import numpy as np

    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.llada_moe.data.digests import digests_of
    from llada_megatron.llada_moe.data.indexed import TokenWriter, token_dtype
    from llada_megatron.llada_moe.data.set_manifest import (
        SetManifest,
        SourceFacts,
        TokenizerFacts,
        prefix_file,
        to_json,
    )
    from llada_megatron.llada_moe.data.tokenizer_files import load_directly

    vocabulary = prefix_file(prefix, ".tokenizer.json")
    vocabulary.write_text(facts.tokenizer(), "utf-8")
    tokenizer = load_directly(vocabulary)
    texts = list(facts.training_texts())
    dtype = token_dtype(tokenizer.vocab_size)
    writer = TokenWriter(prefix, dtype)
    for text in texts:
        ids = tokenizer.encode(text)
        ids += [tokenizer.eos_id] * (length - len(ids))
        writer.add(np.array(ids, np.int32), [length], [len(text.encode())])
    writer.finish()
    manifest = SetManifest(
        tokenizer=TokenizerFacts(
            file=vocabulary.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
        ),
        documents=len(texts),
        tokens=length * len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        dtype=np.dtype(dtype).name,
        sources=[SourceFacts(input="generated facts", files=1, documents=len(texts), bytes=sum(map(len, texts)))],
        digests=digests_of(prefix, (".bin", ".idx", ".bytes")),
    )
    prefix_file(prefix, ".json").write_text(json.dumps(to_json(manifest), indent=2) + "\n", "utf-8")


def arm_of_seed(recipe: ReversalRecipe, arm: str, seed: int, folder: Path) -> list[Answer]:
    """Train one model in this process, unless that has been done, and ask it.

    Args:
        recipe: the models.
        arm: what this one learns.
        seed: of the facts, the weights and the order of the sentences.
        folder: of the seed.
    """
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.llada_moe.data.tokenizer_files import load_directly
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
    from llada_megatron.parallel.evaluation.reversal_answers import ReversalAnswers
    from llada_megatron.parallel.training.trainer import Trainer

    facts = make_facts(seed, recipe.pairs)
    prefix = _prepared(facts, folder, recipe.length)
    vocabulary = load_directly(prefix.with_name(f"{prefix.name}.tokenizer.json"))
    run = recipe.run(arm, seed, prefix, folder / arm.replace(" ", "-"), vocabulary)
    with warnings.catch_warnings(), topology.world_of_one(seed):
        warnings.simplefilter("ignore")  # torch and Megatron announce coming changes of their own insides
        Trainer(run).train(lambda: False)
    with open_checkpoint(run.output_dir) as loaded:
        return ReversalAnswers(loaded, facts, recipe.length, seed).all()


def _prepared(facts: ReversalFacts, folder: Path, length: int) -> Path:
    """The prefix of the seed's prepared set, which is made unless it is there, or another process makes it now."""
    whole = folder / "facts"
    folder.mkdir(parents=True, exist_ok=True)
    if not whole.is_dir():
        with tempfile.TemporaryDirectory(prefix=".facts.", dir=folder) as scratch:
            part = Path(scratch) / "set"
            part.mkdir()
            prepare_facts(facts, part / "facts", length)
            try:
                part.rename(whole)
            except OSError:
                if not whole.is_dir():  # otherwise another process was faster
                    raise
    return whole / "facts"
