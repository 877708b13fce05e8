"""What the model predicts without gradients stands in the inputs of its step, and nothing else is different."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.model.head import DraftRows
from llada_megatron.parallel import build
from llada_megatron.parallel.training.distributed_optimizer import build_optimizer
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import EDITING, MODELS, parity_run, with_operations
from llada_megatron.tools.bench.measurement import single_process

ALWAYS = dataclasses.replace(EDITING, share=1.0, draft_share=1.0)
RUN = parity_run(
    with_operations(MODELS["sigmoid"]), LayoutConfig(), objective="block_diffusion", block_size=5, editing=ALWAYS,
    micro_batch_size=4, logits_chunk_mb=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def step():
    with single_process():
        models = build.wrap(RUN, build.build_run_chunks(RUN))
        yield TrainingStep(RUN, models, build_optimizer(RUN, models), parity.SyntheticData(RUN))


def gradients(step: TrainingStep) -> list[torch.Tensor]:
    """Loss, gradients, and the expert biases that the tokens of the step make of none."""
    biases = [module.expert_bias for module in step.models[0].modules() if hasattr(module, "expert_bias")]
    for bias in biases:
        bias.zero_()
    loss = step.gradients(0).loss
    found = [loss, *(p.main_grad for p in step.models[0].parameters()), *biases]
    assert len(biases) == 3 and all(bias.any() for bias in biases)
    return [value.clone() for value in found]


def test_a_step_reads_what_the_model_says_at_these_positions(step, monkeypatch):
    batches = step.batches(0)
    module = step.models[0].module
    for batch in batches:
        drafted = batch.drafted
        assert drafted.any() and not drafted[:, 32:].any() and (batch.inputs[drafted] == RUN.model.mask_token_id).all()
        assert (batch.weights[drafted] == 1).all()
        with torch.no_grad():
            logits = module.eval()(batch.inputs, batch.boundaries, rows=drafted, pattern=step.objective.pattern(0))
        module.train()
        logits[:, sorted(RUN.model.never_drafted)] = -torch.inf
        batch.inputs = batch.inputs.masked_scatter(drafted, logits.argmax(-1))
        assert (batch.inputs != batch.labels)[drafted].float().mean() > 0.9  # of weights that have learnt nothing
    found = gradients(step)
    monkeypatch.setattr(type(step.objective), "writes_drafts", lambda self, step: False)
    monkeypatch.setattr(step, "data", Given(batches))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(step), strict=True))


def test_a_step_that_learns_next_tokens_runs_no_pass_for_drafts(step, monkeypatch):
    written = []
    monkeypatch.setattr("llada_megatron.parallel.training.step.write_drafts", lambda *_: written.append(1))
    monkeypatch.setattr(type(step.objective), "autoregressive_steps", 1)
    step.gradients(0)
    assert not written
    step.gradients(1)
    assert written == [1]


class Given:
    """Samples that are batches already."""

    def __init__(self, batches):
        self.left = list(batches)

    def batch(self, numbers):
        return self.left.pop(0)


@pytest.mark.parametrize("shards", [1, 2])
def test_tokens_are_written_where_they_are_wanted(shards):
    wanted = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    wanted[:, :4] &= shards == 1  # a slice without any
    tokens = torch.arange(100, 124).view(3, 8)
    rows = DraftRows.of(wanted, {5}, 0, shards)
    written = rows.written(torch.zeros(3, 8, dtype=torch.int64), tokens.t().flatten()[rows.position])
    assert torch.equal(written, tokens * wanted) and rows.index.numel() * shards >= rows.real.numel()
