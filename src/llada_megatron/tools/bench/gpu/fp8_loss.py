"""Whether FP8 learns as bf16 does: the loss of the same two hundred steps in each precision.

The text can be predicted from its neighbours alone: embedding and output layer, which no recipe computes in FP8, get no
further than `WITHOUT_CONTEXT`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.build import build_run_chunks, wrap
from llada_megatron.parallel.training.distributed_optimizer import build_optimizer, set_learning_rate
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.tools.bench.gpu.agreement import SyntheticWindows
from llada_megatron.tools.bench.gpu.part_run import PartRun, release_memory
from llada_megatron.tools.bench.gpu.precisions import forget_scales, precisions
from llada_megatron.tools.bench.gpu.workloads import workload

STEPS, TOY_STEPS = 200, 3
LAST = 20
"""The mean loss of so many last steps is compared."""

MODEL = ModelConfig(
    family="llada_moe",
    num_layers=2,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=8192,
    max_sequence_length=512,
    mask_token_id=3,
    eos_token_id=2,
    qk_norm=True,
    moe=MoEConfig(
        num_experts=8, top_k=2, expert_ffn_hidden_size=384, aux_loss_coefficient=0.01, z_loss_coefficient=0.001
    ),
)
"""Some 20 million parameters; every width is a multiple of 128, as the FP8 recipes like it."""

WORDS, WORDS_OF_A_DOCUMENT = 64, 4
"""Tokens of all the text, all equally frequent, and how many of them one document has."""
WITHOUT_CONTEXT = math.log(WORDS)
"""Nats: the least loss of a model that sees no other position; log(WORDS_OF_A_DOCUMENT) = 1.39 of one that knows
which words the document has."""


class FewWordWindows(SyntheticWindows):
    """Documents of a few words each, every position one of them: the words that are visible tell what is masked."""

    def _text(self, number: int, boundaries: NDArray[np.int32]) -> NDArray[np.int64]:
        generator = np.random.default_rng(number)
        words = self._tokens[:WORDS]
        few = min(WORDS_OF_A_DOCUMENT, len(words))
        lengths = np.diff(boundaries)
        return np.concatenate([generator.choice(generator.choice(words, few, replace=False), n) for n in lengths])


def compare(part: PartRun) -> None:
    """One measurement a precision, all on the same windows and masks from the same weights."""
    for precision in precisions(part.machine):
        part.measure(precision.name, _losses, part.toy, precision.training)
        forget_scales()
        release_memory()


def training_run(toy: bool, keys: dict[str, Any]) -> RunConfig:
    """Eight windows of 512 a step."""
    model, length, sequences = (load_model("tiny-moe-softmax"), 32, 2) if toy else (MODEL, 512, 8)
    run = workload(model, length, sequences, 1, **keys).run
    steps = TOY_STEPS if toy else STEPS
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, steps=steps),
        optimizer=dataclasses.replace(
            run.optimizer, learning_rate=LearningRateConfig(peak=1e-3, warmup_steps=steps // 10)
        ),
        layout=LayoutConfig(),
    )


def _losses(toy: bool, keys: dict[str, Any]) -> dict[str, Any]:
    run = training_run(toy, keys)
    models = wrap(run, build_run_chunks(run))
    optimizer = build_optimizer(run, models)
    step = TrainingStep(run, models, optimizer, FewWordWindows(run, documents=2))
    losses = []
    for number in range(run.training.steps):
        set_learning_rate(run, optimizer, number)
        losses.append(float(step(number).losses.loss))
    last = statistics.mean(losses[-LAST:])
    return {"first": losses[0], "last": last, "of_loss_without_context": last / WITHOUT_CONTEXT, "losses": losses}
