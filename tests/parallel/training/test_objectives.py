"""Another objective is one file: registered, checked, trained, measured and resumed, with nothing else touched."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llada_megatron.llada_moe.config import from_dict, to_dict
from llada_megatron.llada_moe.config.checks import validate_run
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.batch import Row
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective, objective_kinds
from llada_megatron.llada_moe.objectives.interface import Objective, register
from llada_megatron.parallel.training.metrics_file import read_metrics
from tests.corpora import model_for, prepared_set
from tests.ranks import run_ranks

STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvenTokensConfig(ObjectiveConfig):
    """A key of its own, and a model to stay close to."""

    stride: int = 2
    reference: str | None = None


@register("every_other")
class EveryOther(Objective):
    """Predict every other token from those between, with an attention pattern that depends on the step."""

    config_class = EvenTokensConfig
    fills_masks = True

    def __init__(self, config):
        super().__init__(config)
        self.batches, self.frozen = 0, set()

    def factors(self, counts, batch):
        self.batches += 1
        return super().factors(counts, batch)

    def rows(self, run, split, vocab_size):
        def make(tokens, boundaries, at):
            hidden = np.arange(len(tokens)) % self.config.stride == at.number % self.config.stride
            inputs = np.where(hidden, run.model.mask_token_id, tokens)
            return Row(inputs, tokens, hidden.astype(np.float32), boundaries, 1 / self.config.stride, len(tokens))

        return make

    def pattern(self, step):
        return CAUSAL if step == 1 else FULL if step == 0 else AttentionPattern(4)

    def frozen_models(self):
        return {"reference": self.config.reference} if self.config.reference else {}

    def loss(self, weighted, factors, frozen):
        apart = weighted - frozen["reference"] if frozen else weighted
        self.frozen |= set(frozen)
        return (apart * factors).sum()

    def description(self):
        return "every other token"

    def metrics(self, loss, bytes_per_token):
        return {"perplexity": math.exp(loss)}

    def check(self, refuse):
        if self.config.stride < 2:
            refuse("objective.stride", f"{self.config.stride} leaves nothing to see")

    def state(self):
        return {"batches": self.batches}

    def load_state(self, state):
        self.batches = state.get("batches", 0)


def train(run):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    known = trainer.objective.batches
    trainer.train(lambda: False)
    model = trainer.state.chunks[0]
    return known, trainer.objective.frozen, model.pattern, [p.detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("objectives")
    _, tokenizer = prepared_set(root)

    def make(name, steps=STEPS, layout=LayoutConfig(data_parallel=2), **keys):  # noqa: B008 - frozen
        return RunConfig(
            model=model_for(tokenizer, "tiny-dense"),
            training=TrainingConfig(steps=steps, sequence_length=32, global_batch_size=4, precision="fp32"),
            data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
            objective=EvenTokensConfig(kind="every_other", **keys),
            layout=layout,
            checkpoint=CheckpointConfig(interval=STEPS),
            validation=ValidationConfig(interval=STEPS, sequences=4),
            logging=LoggingConfig(interval=1, tensorboard=False),
            output_dir=str(root / name),
        )

    return make


def test_a_new_objective_is_registered_checked_and_read_back(make_run):
    run = make_run("checked", stride=3)
    assert objective_kinds() == [
        "autoregressive",
        "autoregressive_sft",
        "block_diffusion",
        "block_diffusion_sft",
        "diffusion",
        "every_other",
        "joint",
        "sft",
        "whole_word_diffusion",
    ]
    validate_run(run)
    again = from_dict(RunConfig, to_dict(run))
    assert again == run and again.objective.stride == 3
    assert isinstance(make_objective(again.objective), EveryOther)
    with pytest.raises(ConfigError, match=r"objective\.stride: 1 leaves nothing to see"):
        validate_run(dataclasses.replace(run, objective=EvenTokensConfig(kind="every_other", stride=1)))
    with pytest.raises(ConfigError, match=r"unknown key"):
        from_dict(RunConfig, to_dict(run) | {"objective": {"kind": "diffusion", "stride": 2}})
    wrong = dataclasses.replace(run, objective=ObjectiveConfig(kind="every_othr"))
    with pytest.raises(
        ConfigError, match=r"expected one of autoregressive, .*sft, whole_word_diffusion, found 'every_othr'"
    ):
        validate_run(wrong)


def test_it_trains_validates_and_resumes_with_its_state_metrics_and_patterns(make_run):
    run = make_run("plain")
    (known, _, pattern, _), other = run_ranks(train, 2, run)
    assert known == 0 and pattern == other[2] == AttentionPattern(4)  # that of the last step
    lines = read_metrics(run.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["perplexity"] for line in lines] == pytest.approx([math.exp(line["loss"]) for line in lines])
    assert not any("bits_per_byte" in line for line in lines)
    assert lines[-1]["validation/loss"] > 0
    # no bound, and weights that are not 1 / mask ratio: neither figure would be true
    assert not any(key.startswith(("validation/bits", "loss_by_mask_ratio")) for key in lines[-1])
    longer = make_run("plain", steps=STEPS + 1)
    (known, *_), _ = run_ranks(train, 2, longer)
    # two micro-batches a rank and step, and two of the validation: what was counted before the save
    assert known == 2 * STEPS + 2
    for layout in (LayoutConfig(), LayoutConfig(tensor_parallel=2), LayoutConfig(pipeline_parallel=2)):
        spread = make_run(f"plain-{layout.tensor_parallel}{layout.pipeline_parallel}", layout=layout)
        run_ranks(train, layout.world_size, spread)
        losses = [line["loss"] for line in read_metrics(spread.output_dir)]
        assert losses == pytest.approx([line["loss"] for line in lines], rel=1e-5)


@pytest.mark.parametrize("axis", ["data_parallel", "tensor_parallel", "pipeline_parallel"])
def test_a_frozen_model_is_asked_about_the_same_sequences_under_any_layout(make_run, axis):
    first = make_run("first", steps=1)
    if not Path(first.output_dir).exists():
        run_ranks(train, 2, first)
    layout = LayoutConfig(**{axis: 2})
    plain = make_run(f"same-start-{axis}", layout=layout)
    plain = dataclasses.replace(plain, checkpoint=dataclasses.replace(plain.checkpoint, load=first.output_dir))
    held = dataclasses.replace(
        plain,
        objective=dataclasses.replace(plain.objective, reference=first.output_dir),
        output_dir=f"{plain.output_dir}-held",
        validation=ValidationConfig(),
    )
    expected, found = run_ranks(train, 2, plain), run_ranks(train, 2, held)
    assert {frozenset(rank[1]) for rank in found} >= {frozenset({"reference"})}
    losses = [line["loss"] for line in read_metrics(held.output_dir)]
    assert losses[0] == pytest.approx(0, abs=1e-6)  # the model is the frozen one before its first update
    assert losses[-1] < 0  # and better afterwards
    for (*_, weights), (*_, same) in zip(expected, found, strict=True):
        # a constant beside the loss changes no gradient
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_an_unknown_kind_in_a_checkpoint_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"objective\.kind: expected one of .*, found 'diffusoin'; did you mean"):
        make_objective(ObjectiveConfig(kind="diffusoin"))
