"""LoRA and frozen parts: gradients, norm, updates, against one process and against the gradients of whole weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig
from llada_megatron.llada_moe.model.parameters import trained_parameters
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import DENSE_LAYOUTS, MODELS, MOE_LAYOUTS, parity_run
from tests.ranks import run_ranks

LORA = LoRAConfig(rank=4, alpha=8.0)


def lora_run(model, layout, **training):
    small = dataclasses.replace(MODELS[model], num_layers=2)
    return parity_run(small, layout, **({"lora": LORA} | training))


@contextlib.contextmanager
def drawn_factors():
    """B is drawn too, or the gradient of A were zero."""
    from llada_megatron.llada_moe.model import initialization

    with pytest.MonkeyPatch.context() as patch:
        usual = initialization._deviation
        patch.setattr(initialization, "_deviation", lambda key, *a: 0.1 if key.endswith("lora_B") else usual(key, *a))
        yield


def gradients_of(run):
    with drawn_factors():
        return parity.rank_gradients(run)


def measured(run):
    parts = run_ranks(gradients_of, run.layout.world_size, run)
    return parity.Gradients(parts[0][0], parts[0][1], parity.join_parts(part for rank in parts for part in rank[2]))


def with_merged_weights(run):
    """Loss and gradients of the whole weights, into which the factors were merged, and the factors; in one process."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from llada_megatron.llada_moe.model import lora
    from llada_megatron.parallel import build, sharded_state, topology

    topology.initialize(run.layout, run.training.seed)
    factors = {}
    make = build.build_run_chunks

    def merged(run):
        with drawn_factors():
            chunks = make(run)
        for shard in nested_values(sharded_state.apply_factories_copy(chunks[0])):
            if shard.key.endswith(("lora_A", "lora_B")):
                axes = shard.prepend_axis_num
                values = shard.data.detach().reshape((1,) * axes + tuple(shard.data.shape)).numpy().copy()
                factors[len(factors)] = (shard.key, shard.global_shape, shard.global_offset, values)
        lora.merge(chunks)
        assert not any(lora.has_factors(module) or "Adapted" in type(module).__name__ for module in chunks[0].modules())
        return [chunk.requires_grad_() for chunk in chunks]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_run_chunks", merged)
        loss, _, parts = parity.step_gradients(run, parity.SyntheticData(run))
    return loss, parts, list(factors.values())


@pytest.fixture(scope="module")
def alone():
    return measured(lora_run("sigmoid", LayoutConfig()))


def test_gradients_of_factors_follow_from_those_of_the_weights(alone):
    """d/dB = s dW A^T and d/dA = s B^T dW."""
    ((loss, parts, factors),) = run_ranks(with_merged_weights, 1, lora_run("sigmoid", LayoutConfig()))
    assert loss == pytest.approx(alone.loss, rel=1e-6)
    whole, values = parity.join_parts(parts), parity.join_parts(factors)
    assert len(alone.tensors) == len(values) == 2 * (2 * 2 + 2 + 2 * 2)
    for key in alone.tensors:
        layer, _, factor = key.rpartition(".")
        dw = whole[f"{layer}.weight"]
        other = values[f"{layer}.{'lora_B' if factor == 'lora_A' else 'lora_A'}"]
        expected = 2.0 * (other.mT @ dw if factor == "lora_A" else dw @ other.mT)
        torch.testing.assert_close(alone.tensors[key], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["TP2.SP.EP2", "TP2.SP.ETP2"])
def test_factors_under_a_layout_equal_one_process(alone, name):
    error, where = parity.compare(alone, measured(lora_run("sigmoid", MOE_LAYOUTS[name], recompute="full")))
    assert error <= parity.GOAL, where


def test_factors_of_a_dense_model_equal_one_process():
    """Without sequence parallelism, and with a tied embedding, which is frozen, on two stages."""
    one = measured(lora_run("tied", LayoutConfig()))
    for name in ("TP2", "PP2"):
        error, where = parity.compare(one, measured(lora_run("tied", DENSE_LAYOUTS[name])))
        assert error <= parity.GOAL, (name, where)


def in_grouped_products(run):
    from llada_megatron.llada_moe.model import grouped

    with grouped.everywhere():
        return gradients_of(run)


def test_grouped_products_of_factors_equal_those_by_expert(alone):
    ((loss, norm, parts),) = run_ranks(in_grouped_products, 1, lora_run("sigmoid", LayoutConfig()))
    error, where = parity.compare(alone, parity.Gradients(loss, norm, parity.join_parts(parts)))
    assert error <= parity.GOAL, where


def updated(run):
    """Norm of unit gradients; then the weights before and after two updates, and which of them have gradients."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.overlap import complete_weights
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    adam = distributed_optimizer.build_optimizer(run, models)
    for parameter in chunks[0].parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1.0)
    adam.prepare_grads()
    norm = float(distributed_optimizer.gradient_norm(adam))
    before = {name: tensor.clone() for name, tensor in chunks[0].state_dict().items() if torch.is_tensor(tensor)}
    step = TrainingStep(run, models, adam, parity.SyntheticData(run))
    for number in range(2):
        distributed_optimizer.set_learning_rate(run, adam, number)
        step(number)
    complete_weights(models)
    after = {name: tensor for name, tensor in chunks[0].state_dict().items() if name in before}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    return norm, changed, {name for name, _ in chunks[0].named_parameters()}


OVERLAP = dataclasses.replace(MOE_LAYOUTS["EP2"], overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.parametrize(
    ("targets", "layout"),
    [(["linear_qkv", "experts.linear_fc2"], MOE_LAYOUTS["TP2.SP.EP2"]), (["experts.linear_fc1"], OVERLAP)],
    ids=["TP2.SP.EP2", "experts alone, with overlap"],
)
def test_updates_reach_the_factors_alone_and_the_norm_counts_each_once(targets, layout):
    lora = LoRAConfig(rank=4, alpha=8.0, targets=targets)
    run = lora_run("sigmoid", layout, lora=lora)
    ranks = run_ranks(updated, 2, run)
    trained = trained_parameters(run.model, run.training)
    assert [rank[0] for rank in ranks] == pytest.approx([math.sqrt(trained)] * 2, rel=1e-6)
    for _, changed, names in ranks:
        assert changed == {name for name in names if "lora_" in name} and changed


def test_frozen_parts_stay_and_the_others_learn_as_before():
    """With layers that are run again, which need an input with a gradient."""
    frozen = ["embedding", "router", "experts", "norms"]
    run = lora_run("sigmoid", LayoutConfig(), lora=None, frozen=frozen, recompute="full")
    norm, changed, names = run_ranks(updated, 1, run)[0]
    assert norm == pytest.approx(math.sqrt(trained_parameters(run.model, run.training)), rel=1e-6)
    kept = {name for name in names if any(word in name for word in ("embedding.", ".router.", ".experts.", "norm"))}
    assert changed == names - kept  # the expert biases are among what is unchanged
    part, whole = (
        measured(dataclasses.replace(run, training=dataclasses.replace(run.training, frozen=parts)))
        for parts in (frozen, [])
    )
    assert part.tensors.keys() < whole.tensors.keys() and part.grad_norm < whole.grad_norm
    for key, gradient in part.tensors.items():
        torch.testing.assert_close(gradient, whole.tensors[key], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("tied", "frozen"), [(True, "embedding"), (False, "output_layer")])
def test_the_copy_of_a_tied_embedding_on_the_last_stage_is_frozen_with_it(tied, frozen):
    from llada_megatron.llada_moe.config.training import TrainingConfig
    from llada_megatron.parallel import build

    for parts in (["embedding"], ["output_layer"]):
        stage = torch.nn.ModuleDict({"output_layer": torch.nn.Linear(2, 2, bias=False)})
        stage.share_embeddings_and_output_weights, stage.pre_process = tied, False
        build.freeze([stage], TrainingConfig(steps=1, sequence_length=8, global_batch_size=1, frozen=parts))
        assert stage["output_layer"].weight.requires_grad == (parts != [frozen])
