"""Small models that have learnt the small language, trained once by the product's own step and then found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llada_megatron import __version__
from llada_megatron.console import message
from llada_megatron.llada_moe.config import dump_yaml, to_dict
from llada_megatron.llada_moe.config.data import DataConfig
from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.parallel.checkpoint.manifest import steps, write_durably
from llada_megatron.tools.bench.measurement import single_process
from llada_megatron.tools.bench.sampling.language import (
    BlockDiffusionBatches,
    ExampleBatches,
    Examples,
    JointBatches,
    Language,
)

MODEL_FILE = "model.yaml"


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of a small model."""

    steps: int
    learning_rate: float
    block_size: int | None = None
    """Positions of a block of block-causal attention, counted from the start of the sequence; None = full attention."""
    parent: Recipe | None = None
    """Start from its weights."""
    language: Language = field(default_factory=Language)
    new_tokens: int = 128
    """Positions of a response, filled up with end-of-text tokens."""
    num_layers: int = 6
    hidden_size: int = 256
    ffn_hidden_size: int = 768
    heads: int = 8
    sequences: int = 8
    """Of a step."""
    edited_sequences: float = 0.5
    edited_tokens: float = 0.1
    """As in `ExampleBatches`."""
    warmup_steps: int = 50
    seed: int = 0

    @property
    def name(self) -> str:
        """What its directory is called: another recipe has another name."""
        kind = self.kind if self.block_size is None else f"{self.kind}-{self.block_size}"
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def kind(self) -> str:
        """What its name begins with."""
        return "full" if self.block_size is None else "block-causal"

    @property
    def minutes(self) -> float:
        """About how long its training takes on one free core: a second a step."""
        return self.steps / 60

    @property
    def objective(self) -> ObjectiveConfig:
        """What it learns."""
        return ObjectiveConfig(block_size=self.block_size, normalization="answer_length")

    @property
    def model(self) -> ModelConfig:
        """A dense LLaDA."""
        return ModelConfig(
            family="llada",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden_size // self.heads,
            vocab_size=self.language.vocab_size,
            max_sequence_length=1024,
            mask_token_id=self.language.mask_id,
            eos_token_id=self.language.eos_id,
            rope_theta=10000.0,
        )

    @property
    def length(self) -> int:
        """Positions of a training sequence: the longest prompt and its response, in whole blocks."""
        block = self.block_size or 1
        return -(-(self.language.longest_prompt + self.new_tokens) // block) * block

    @property
    def batches(self) -> Examples:
        """Under block-causal attention a response is filled up to the end of its last block, and further: what stands
        behind a block does not reach it."""
        return ExampleBatches(
            self.language,
            self.sequences,
            self.length,
            self.new_tokens if self.block_size is None else None,
            self.edited_sequences,
            self.edited_tokens,
            self.seed,
        )

    @property
    def run(self) -> RunConfig:
        """The run of its training, in fp32 on one rank; read where `parallel.device` is installed."""
        from llada_megatron.tools.bench.our_step import run_config

        run = run_config(self.model, self.sequences, self.length, self.learning_rate, clip=1.0)
        rate = LearningRateConfig(
            peak=self.learning_rate, warmup_steps=self.warmup_steps, decay_steps=self.steps // 2, decay_shape="cosine"
        )
        return dataclasses.replace(
            run,
            training=dataclasses.replace(run.training, steps=self.steps, seed=self.seed),
            objective=self.objective,
            data=DataConfig(sets=[]),
            optimizer=OptimizerConfig(learning_rate=rate),
            output_dir="",
        )


@dataclass(frozen=True)
class EditingRecipe(Recipe):
    """Training by `objective.kind: block_diffusion` on whole texts, prompts too, with wrong tokens beside masks."""

    editing: EditingConfig = field(default_factory=EditingConfig)

    @property
    def kind(self) -> str:
        """What its name begins with."""
        return "editing"

    @property
    def minutes(self) -> float:
        """A step reads each text twice."""
        return 2.0 * super().minutes

    @property
    def model(self) -> ModelConfig:
        """It can say delete and insert by two ids that the language leaves free."""
        size = self.language.vocab_size
        return dataclasses.replace(super().model, delete_token_id=size - 4, insert_token_id=size - 5)

    @property
    def objective(self) -> BlockDiffusionConfig:
        """That of the product."""
        return BlockDiffusionConfig(
            kind="block_diffusion", block_size=self.block_size, random_length_probability=0.0, editing=self.editing
        )

    @property
    def batches(self) -> Examples:
        """Rows that the objective makes. Wrong tokens are of the language: others would be too easily found."""
        return BlockDiffusionBatches(self.language, self.run, self.seed)


@dataclass(frozen=True)
class JointRecipe(Recipe):
    """Of a model that drafts and verifies; it learns nothing of wrong tokens."""

    edited_sequences: float = 0.0
    autoregressive_coefficient: float = 1.0
    diffusion_coefficient: float = 0.3

    @property
    def kind(self) -> str:
        """What its name begins with."""
        return "joint"

    @property
    def minutes(self) -> float:
        """A step reads twice the positions, and learns from more of them."""
        return 2.4 * super().minutes

    @property
    def objective(self) -> JointConfig:
        """The next token of a response, and its masked blocks."""
        return JointConfig(
            kind="joint",
            block_size=self.block_size,
            normalization="answer_length",
            autoregressive_coefficient=self.autoregressive_coefficient,
            diffusion_coefficient=self.diffusion_coefficient,
        )

    @property
    def batches(self) -> JointBatches:
        """Both halves."""
        examples = super().batches
        assert isinstance(examples, ExampleBatches)
        return JointBatches(examples, self.autoregressive_coefficient, self.diffusion_coefficient)


FULL = Recipe(steps=900, learning_rate=1e-3)
"""Takes about a second a step on one CPU core."""
BLOCK_CAUSAL = Recipe(steps=300, learning_rate=5e-4, block_size=32, parent=FULL, seed=1)
"""As LLaDA2: full attention inside blocks, which are counted from the start of the sequence, causal between them."""
EDITING = EditingRecipe(
    steps=120,
    learning_rate=5e-4,
    block_size=32,
    parent=BLOCK_CAUSAL,
    seed=2,
    editing=EditingConfig(share=0.5, replace_ratio=0.1, missing_ratio=0.03, surplus_ratio=0.03),
)
"""As LLaDA2.2: it learns to replace, delete and insert. About two seconds a step, which reads each text twice."""
JOINT = JointRecipe(steps=300, learning_rate=1e-3, block_size=16, seed=2)
"""Drafts blocks and verifies them. A step reads twice the positions, so that all take about as long as `FULL`'s."""
RECIPES: dict[str, Recipe] = {"bidirectional": FULL, "block-causal": BLOCK_CAUSAL, "editing": EDITING, "joint": JOINT}
"""By their attention, or by what else they have learnt, in the order in which they are trained."""


def is_trained(directory: Path, recipe: Recipe) -> bool:
    """Whether `train_or_find` has nothing to train."""
    return bool(steps(Path(directory) / recipe.name / "checkpoints"))


def train_or_find(directory: Path, recipe: Recipe, threads: int = 1) -> Path:
    """The run directory of the recipe's model below `directory`; trained now unless it was before.

    Args:
        threads: of the CPU, for the training.

    Raises:
        ResourceError: the disk is full.
    """
    target = Path(directory) / recipe.name
    if is_trained(directory, recipe):
        return target
    parent = train_or_find(directory, recipe.parent, threads) if recipe.parent is not None else None
    message(f"training a small model for {recipe.steps} steps, once; it stays in {target}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with single_process(recipe.seed):
            _train(target, recipe, parent)
    finally:
        torch.set_num_threads(before)
    return target


def _train(target: Path, recipe: Recipe, parent: Path | None) -> None:
    from llada_megatron.parallel.checkpoint.search import find_checkpoints
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.sharded_state import load_model_state, model_state
    from llada_megatron.parallel.training.distributed_optimizer import set_learning_rate
    from llada_megatron.parallel.training.progress import TrainingProgress
    from llada_megatron.tools.bench.our_step import OurStep

    run, batches, store = recipe.run, recipe.batches, CheckpointStore(target / "checkpoints")
    ours = OurStep(run)
    if parent is not None:
        state, _ = store.load(find_checkpoints(parent)[0], model_state([ours.chunk]))
        load_model_state([ours.chunk], state)
        ours.optimizer.reload_model_params()
    with TrainingProgress(recipe.steps, line_seconds=20.0) as progress:
        for step in range(recipe.steps):
            set_learning_rate(run, ours.optimizer, step)
            loss = ours.step_on(batches.batch(step))
            progress.update(step + 1, loss)
    target.mkdir(parents=True, exist_ok=True)
    write_durably(target / MODEL_FILE, dump_yaml(run.model).encode())
    store.save(recipe.steps, model_state([ours.chunk]), _metadata(run))


def _metadata(run: RunConfig) -> dict[str, Any]:
    """What the manifest of the checkpoint says of it."""
    return {
        "model": to_dict(run.model),
        "run": to_dict(run),
        "step": run.training.steps,
        "consumed_samples": run.training.steps * run.training.global_batch_size,
        "layout": to_dict(run.layout),
        "versions": {
            "llada-megatron": __version__,
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "tokenizer": None,
    }
