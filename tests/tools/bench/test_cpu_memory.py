"""Memory of CPU runs: what is predicted of a rank, and how all processes of a command are measured."""

import sys
from dataclasses import replace

import pytest

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench import plan
from llada_megatron.tools.bench.planning import cpu_runs
from llada_megatron.tools.bench.planning.cpu_memory import cpu_tensors
from llada_megatron.tools.bench.planning.cpu_runs import COMPARED, CpuRow, ProcessBytes, TreePeak, case_run, tree_peak

HOLDS = "import sys, time; held = bytearray(b'x') * (int(sys.argv[1]) << 20); time.sleep(float(sys.argv[2]))"
STARTS = (
    "import subprocess, sys; held = bytearray(b'x') * (40 << 20); "
    f"subprocess.run([sys.executable, '-c', {HOLDS!r}, '60', '0.8'])"
)


def tensors(name, **training):
    run, _ = case_run(*COMPARED[name], data="data", output="out")
    return cpu_tensors(replace(run, training=replace(run.training, **training)))


def test_a_dense_rank_keeps_what_its_kernels_save():
    """By hand, in elements for each of 32 x 512 tokens: norms 4 x 128, attention 7 x 128, feed-forward 4 x 384."""
    more = tensors("dense")[0] - tensors("dense", micro_batch_size=16)[0]
    loss = 3 * 0.5 * 1024 + (2 * 0.5 + 1) * 128
    assert more == pytest.approx(16 * 512 * 4 * (4 * (4 * 128 + 7 * 128 + 4 * 384) + loss))


def test_each_axis_takes_its_part():
    whole = tensors("dense")[0]
    assert tensors("dense TP2 SP")[0] < tensors("dense TP2")[0] < 0.65 * whole
    assert 0.5 * whole < tensors("dense CP2")[0] < 0.53 * whole  # gathered keys and values replace its own
    first, last = tensors("dense PP2")
    assert first > last  # it holds two micro-batches
    assert tensors("dense", recompute="full")[0] < 0.5 * whole
    assert tensors("MoE DP2 EP2")[0] < tensors("MoE DP2 ETP2")[0]


def test_the_layouts_compared_are_enough_and_can_be_run():
    runs = [case_run(*case, data="data", output="out")[0] for case in COMPARED.values()]
    assert len({(run.model.family, str(run.layout), run.training.recompute) for run in runs}) == len(runs) >= 12


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_processes_of_a_command_are_measured_together():
    alone = tree_peak([sys.executable, "-c", HOLDS, "0", "0.2"], {})
    both = tree_peak([sys.executable, "-c", STARTS], {})
    assert 100 <= (both.together - alone.together) / 2**20 <= 130  # 40 and 60 MiB, and one more Python
    assert both.each >= both.together
    with pytest.raises(ResourceError, match="ZeroDivisionError"):
        tree_peak([sys.executable, "-c", "1 / 0"], {})


def test_a_run_that_is_farther_off_misses_the_goal(monkeypatch, capsys):
    assert ProcessBytes(100.0, 10.0).of(3) == 120.0
    near, far = (CpuRow("", 50.0, size, TreePeak(100.0, 105.0)) for size in (96.0, 106.0))
    monkeypatch.setattr(cpu_runs, "cpu_rows", lambda folder: [near, far])
    share, largest, of_each = plan.cpu_claims()
    assert share.value == 0.5 and share.holds is False and largest.value == pytest.approx(6.0)
    assert of_each.value == pytest.approx(100 - 9600 / 105) and "-8.6%" in capsys.readouterr().out
