"""Where the host waits for the device in a training step: once of our own choice, for the verdict."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, parity_run
from tests.host_waits import HostWaits, Wait
from tests.ranks import run_ranks

MICROBATCHES, MOE_LAYERS = 4, 3

Times = Callable[[int], int]
"""How often, from the number of passes through MoE layers of the rank's stage (those of recomputation counted)."""


def once(_passes: int) -> int:
    return 1


OURS = {
    # loss, norm and whether to stop, of all ranks, in one tensor: what decides on the update must be known before it
    Wait("llada_megatron/parallel/training/recovery/attempt.py", "StepRunner._agreed", "tolist"): once
}
MEGATRONS = {
    # 0.16 only: `if num_tokens > 0`; 0.19 clamps on the device
    Wait("megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads", "__bool__"): once,
    # with neither Transformer Engine nor Apex: a tensor made of the norms of all parameters, and its norm as a number;
    # with them the norm stays on the device in 0.19, and is read once in 0.16
    Wait("megatron/core/utils.py", "local_multi_tensor_l2_norm", "tensor(of tensors)"): once,
    Wait("megatron/core/utils.py", "local_multi_tensor_l2_norm", "tensor(device)"): once,
    Wait("megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32", "item"): once,
    # the exchange must know how many tokens go to each rank and expert
    Wait(
        "megatron/core/transformer/moe/token_dispatcher.py",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "Event.synchronize",
    ): lambda passes: passes,
    # 0.16 without Transformer Engine's permutation: of the tokens, and of their weights
    Wait("megatron/core/transformer/moe/moe_utils.py", "permute", "masked_select"): lambda passes: 2 * passes,
}
"""What is left, and why. With Transformer Engine nothing but the dispatcher's is left in a layer."""


def step_waits(model, layout, recompute):
    """What one rank waits for in a step that is judged, clipped and applied."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.expert_load import ExpertLoad
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.recovery.attempt import RouterStateSnapshot, StepRunner
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    size = layout.data_parallel * MICROBATCHES
    run = parity_run(model, layout, global_batch_size=size, micro_batch_size=1, recompute=recompute)
    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    load = ExpertLoad(models)
    runner = StepRunner(run, step, SimpleNamespace(history=History()), RouterStateSnapshot(models, load.counters))
    step.update(runner(0, lambda: False).norm)
    waits = HostWaits(models)
    waits.mark(*load.counters())
    with waits:
        step.update(runner(1, lambda: False).norm)
    return waits.waits, str(waits)


@pytest.mark.parametrize(
    ("model", "layout", "recompute", "moe_layers"),
    [
        (DENSE, LayoutConfig(), "none", 0),
        (DENSE, LayoutConfig(pipeline_parallel=2), "none", 0),
        (SIGMOID, LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=2), "full", 2 * MOE_LAYERS),
    ],
    ids=["dense", "PP2", "TP2.SP.EP2 recomputed"],
)
def test_a_step_waits_once_and_where_megatron_must(model, layout, recompute, moe_layers):
    for waits, places in run_ranks(step_waits, layout.world_size, model, layout, recompute):
        known = OURS | MEGATRONS
        assert set(waits) <= set(known), f"not explained:\n{places}"
        assert {wait for wait in waits if wait.file.startswith("llada_megatron")} == set(OURS), places
        passes = MICROBATCHES * moe_layers
        assert waits == {wait: known[wait](passes) for wait in waits}, places
        assert any("Event" in wait.what for wait in waits) == bool(moe_layers)


def read_everything():
    """One of each kind of wait, and what is none."""
    import torch

    here, host = torch.device("cpu"), torch.arange(4)
    weight = torch.nn.Linear(4, 4)
    with HostWaits([weight]) as waits:
        host.tolist(), host.nonzero(), bool(host.any()), host[host > 1]
        copied = host.to(here, non_blocking=True)
        made, index = torch.zeros(4, device=here), host.to(here, non_blocking=True)
        y = weight(made + copied)
        y.sum().backward()
        y[:, None].expand(4, 4)[index], y.masked_fill_(y.detach() > 0, 0.0)
        nothing = dict(waits.waits)
        host.to(here), torch.tensor(3, device=here)
        y.tolist(), y[0].item(), float(y[1]), y.nonzero(), y[y > 0], y.cpu().tolist(), y.detach().numpy(), bool(y.any())
        torch.tensor([y[0], y[1]]), weight.weight.grad.sum().item(), torch.equal(y, y)
    return nothing, sorted((wait.what, count) for wait, count in waits.waits.items())


def test_what_counts_as_a_wait():
    nothing, found = run_ranks(read_everything, 1)[0]
    assert nothing == {}
    assert found == [
        ("__bool__", 1), ("__float__", 1), ("cpu", 1), ("equal", 1), ("index", 1), ("item", 2), ("nonzero", 1),
        ("numpy", 1), ("tensor(device)", 1), ("tensor(of tensors)", 1), ("to(device)", 1), ("tolist", 1),
    ]  # fmt: skip
