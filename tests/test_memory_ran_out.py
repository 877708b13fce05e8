"""Memory that runs out in any command ends in one line that says what to lower, and is no defect."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from llada_megatron import cli, memory_ran_out
from llada_megatron.launch.cluster.agent.decisions import faults_of_exits
from llada_megatron.launch.ranks import rank
from llada_megatron.launch.ranks.rank_reports import Failure
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import MemoryRanOutError, ResourceError

ON_A_GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB\nsee the documentation"
)
FP8, SPREAD = "--fp8 tensorwise on a GPU that has FP8", "the model spread over more ranks (layout.tensor_parallel=2)"
LENGTH = "a shorter text or a lower --max-new-tokens"
COMMANDS = {
    ("sample", "x", "--prompt", "a"): ("take a lower --batch-size (now 8); or ", LENGTH, SPREAD, FP8),
    ("chat", "x"): (LENGTH, FP8),
    ("eval", "likelihood", "x", "y"): ("take a lower --positions (now 8192); or ", SPREAD, FP8),
    ("eval", "infill", "x"): ("take a lower --batch-size (now ", SPREAD, FP8),
    ("convert", "import", "x", "y"): ("take fewer --workers",),
    ("inspect", "demo"): ("a lower training.micro_batch_size, or a layout of more ranks",),
    ("env",): (memory_ran_out.GENERAL,),
}
MENTIONED = [LENGTH, SPREAD, FP8, "--batch-size", "--positions", "--workers", "micro_batch_size"]


@pytest.mark.parametrize(("words", "advice"), COMMANDS.items(), ids=" ".join)
def test_a_command_names_what_of_its_own_needs_less(monkeypatch, capsys, words, advice):
    def fails(args):
        raise ON_A_GPU

    module = importlib.import_module(cli.COMMANDS[words[0]][0])
    monkeypatch.setattr(module, "run", fails)
    assert cli.main([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: out of memory on the GPU when 2.50 GiB more were asked for; take ")
    assert err.count("\n") == 1 and all(part in err for part in advice)
    assert [part for part in MENTIONED if part in err] == [
        part for part in MENTIONED if any(part in each for each in advice)
    ]
    assert json.loads(out)["error"] in err


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (MemoryError(), "out of memory on this machine"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "out of memory on this machine when 9 bytes more were asked for",
        ),
        (OSError(12, "Cannot allocate memory"), "out of memory on this machine"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ResourceError("out of memory: take fewer"), None),
    ],
)
def test_which_errors_are_of_memory(failure, said):
    found = memory_ran_out.recognised(failure)
    assert (found and str(found)) == said


def test_a_rank_tells_its_launcher_and_a_job_starts_again(tmp_path):
    failure = Failure.of(1, ON_A_GPU)
    assert failure.user_error is MemoryRanOutError and "Tried to allocate" in failure.stack
    assert memory_ran_out.recognised(failure.user_error(failure.message)).args == (failure.message,)
    (fault,) = faults_of_exits("n1", {1: 1}, [failure], tmp_path, 0.0)
    assert fault.kind == "error" and "out of memory on the GPU" in fault.what


def test_a_rank_of_a_job_says_it_itself(tmp_path, monkeypatch, capsys):
    def fails(stop):
        raise ON_A_GPU

    monkeypatch.setattr(rank.StopRequest, "listen", lambda self, signals: self)
    monkeypatch.setattr(rank, "quieten", lambda *_: lambda: None)
    monkeypatch.setattr(rank, "_leave_at_once", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        rank.run_joined_rank(fails, LayoutConfig(data_parallel=2), tmp_path, 0)
    assert capsys.readouterr().err == (
        f"error: out of memory on the GPU when 2.50 GiB more were asked for; {memory_ran_out.GENERAL}\n"
    )
