"""What `device.install()` does on a GPU and on a login node, where Transformer Engine is installed and no GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from llada_megatron.parallel import device

STEP_BESIDE_TRANSFORMER_ENGINE = """
from tests import te_stub

te_stub.provide()
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from llada_megatron.parallel import device

device.install()
from megatron.core import optimizer
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel import build, topology
from llada_megatron.parallel.training import distributed_optimizer
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.tools.bench.parity import SyntheticData

run = parity_run(MODELS["sigmoid"], LayoutConfig())
topology.join(0, 1, init_method="file://" + __import__("sys").argv[1])
topology.initialize(run.layout, run.training.seed)
models = build.wrap(run, build.build_run_chunks(run))
step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
print(optimizer.Adam.__module__, float(step(0).losses.loss) > 0)
"""


def test_the_missing_gemm_is_there_with_a_gpu_too(monkeypatch):
    """megatron-core 0.16.1 names it in every router call, and defines it beside Transformer Engine only."""
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(device, "_installed", False)
    monkeypatch.setattr(device, "_megatron_imported", lambda: False)
    monkeypatch.setattr(device.torch_adam, "patch_resume", lambda: None)
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    device.install()
    logits = moe_utils.router_gating_linear(torch.randn(4, 8), torch.randn(3, 8), None, torch.float32)
    assert logits.shape == (4, 3)


def test_a_login_node_trains_although_transformer_engine_is_installed(tmp_path):
    """The stub's FusedAdam raises what the real one does without a driver; in a process of its own, since Megatron
    takes it while it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", STEP_BESIDE_TRANSFORMER_ENGINE, str(tmp_path / "store")],
        capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.stdout.split() == ["torch.optim.adamw", "True"], done.stderr
