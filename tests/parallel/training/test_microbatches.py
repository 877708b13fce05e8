"""What a step gives to the output layer: the supervised rows with their own labels and weights, in full precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import DENSE, parity_run
from tests.ranks import run_ranks

BATCH, SEQ = 3, 8


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_supervised_position_is_a_target_once(slices, share):
    from llada_megatron.llada_moe.model.head import Targets

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (BATCH, SEQ), generator=generator)
    weights = torch.rand(BATCH, SEQ, generator=generator) * (torch.rand(BATCH, SEQ, generator=generator) < share)
    ranks = [Targets.of(labels, weights, rank, slices) for rank in range(slices)]
    rows = max(1, *((weights != 0).t().chunk(slices)[rank].sum() for rank in range(slices)), 1)
    found = torch.zeros_like(weights)
    for rank, targets in enumerate(ranks):
        assert targets.index.shape == (rows,)  # equally many on every rank
        assert targets.shards == slices and targets.batch == BATCH
        mine = slice(rank * rows, (rank + 1) * rows)  # as the output layer gathers them
        position = targets.index // BATCH + rank * SEQ // slices
        sequence = targets.index % BATCH
        real = targets.weights[mine] != 0
        assert torch.equal(targets.sequence[mine], sequence)
        assert torch.equal(targets.labels[mine][real], labels[sequence, position][real])
        found.index_put_((sequence, position), targets.weights[mine], accumulate=True)
        assert torch.equal(targets.weights, ranks[0].weights) and torch.equal(targets.labels, ranks[0].labels)
    assert torch.equal(found, weights)


def loss_and_weights(run):
    """The loss of a step, and the weights that the model was given on this rank."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    given, inner = [], models[0].module.module
    hook = inner._postprocess
    inner._postprocess = lambda *args, loss_mask, **kwargs: (
        given.append(loss_mask),
        hook(*args, loss_mask=loss_mask, **kwargs),
    )[1]
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    loss = step.gradients(0).loss
    torch.distributed.all_reduce(loss)
    batches = step.batches(0)
    own = [(t.weights, b.weights.t().flatten()) for t, b in zip(given, batches, strict=True) if t is not None]
    return float(loss), [(str(a.dtype), torch.equal(a[a != 0], b[b != 0])) for a, b in own]


def test_bfloat16_leaves_the_weights_of_the_loss_as_they_are():
    """Megatron's Float16Module casts what the first stage is given, so that weights 1/p were rounded but under PP."""
    runs = [parity_run(DENSE, LayoutConfig(pipeline_parallel=n), precision="bf16") for n in (1, 2)]
    (one,), (_, last) = (run_ranks(loss_and_weights, run.layout.world_size, run) for run in runs)
    assert one[1] and all(found == ("torch.float32", True) for found in one[1] + last[1])
    assert one[0] == pytest.approx(last[0], rel=1e-5)


def test_norms_on_the_device_are_added_up_there():
    from llada_megatron.parallel.training.distributed_optimizer import gradient_norm

    def optimizer(*norms, shared=False):
        parts = [SimpleNamespace(get_grad_norm=lambda norm=norm: norm) for norm in norms]
        return SimpleNamespace(
            chained_optimizers=parts,
            grads_states_parallel_group_is_shared=lambda: shared,
            get_grad_norm=lambda: "Megatron's own",
        )

    both = gradient_norm(optimizer(torch.tensor([3.0]), torch.tensor(4.0)))
    assert torch.is_tensor(both) and both.shape == () and both == 5.0
    assert gradient_norm(optimizer(3.0, 4.0)) == 5.0
    assert gradient_norm(optimizer(3.0, 4.0, shared=True)) == gradient_norm(optimizer(3.0)) == "Megatron's own"


@pytest.mark.parametrize("cuda", [False, True])
def test_each_tensor_of_a_batch_is_copied_from_pinned_memory_where_there_is_a_gpu(monkeypatch, cuda):
    from llada_megatron.llada_moe.model import transfer
    from llada_megatron.llada_moe.objectives import make_objective
    from llada_megatron.parallel.training import microbatches
    from llada_megatron.tools.bench.parity import SyntheticData

    pinned, copies, copy = [], [], torch.Tensor.to

    def is_pinned(tensor):
        return any(tensor is one for one in pinned)

    def pin(tensor):
        if not is_pinned(tensor):
            pinned.append(tensor.clone())
        return tensor if is_pinned(tensor) else pinned[-1]

    def to(tensor, *arguments, **named):
        if any(isinstance(argument, torch.device) for argument in arguments):
            copies.append((is_pinned(tensor), named))
        return copy(tensor, *arguments, **named)

    alone = {"get_context_parallel_rank": 0, "get_context_parallel_world_size": 1, "is_pipeline_last_stage": True}
    groups = {name: lambda value=value, **_: value for name, value in alone.items()}
    monkeypatch.setattr(microbatches, "parallel_state", SimpleNamespace(**groups))
    monkeypatch.setattr(microbatches, "_global_counts", lambda staged: staged[0].counts)
    monkeypatch.setattr(transfer, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: cuda)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    run = parity_run(DENSE, LayoutConfig())
    objective, batch = make_objective(run.objective, run.training), SyntheticData(run).batch([0, 1])
    staged = microbatches.stage(run.layout, batch, objective.pattern(0), never=(1,))
    rows = [*vars(staged.targets).values(), *vars(staged.drafts).values()]
    given = [staged.inputs, *filter(torch.is_tensor, rows)]
    assert len(given) == 9 and {is_pinned(tensor) for tensor in given} == {cuda}
    monkeypatch.setattr(torch.Tensor, "to", to)
    microbatches.prepare(objective, [staged], 0)
    assert len(copies) == 9 + 3  # factors, mask ratios and counts of the step
    assert all(copied == (cuda, {"non_blocking": True}) for copied in copies)
