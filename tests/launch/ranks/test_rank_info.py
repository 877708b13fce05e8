"""A process finds its rank in a job of torchrun or SLURM, or is told what is missing."""

from __future__ import annotations

import pytest

from llada_megatron.launch.ranks.rank_info import RankInfo, check_world, find_rank_info
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "node7",
}


def test_neither_launcher():
    assert find_rank_info({"HOME": "/"}) is None


def test_torchrun():
    assert find_rank_info(TORCHRUN) == RankInfo("torchrun", 5, 1, 8, "head", 29500)


def test_torchrun_inside_a_slurm_step_wins():
    assert find_rank_info(SRUN | TORCHRUN).launcher == "torchrun"


def test_half_a_torchrun_environment_is_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT not set"):
        find_rank_info({"RANK": "0", "WORLD_SIZE": "2"})


def test_srun_on_one_node():
    info = find_rank_info(SRUN)
    assert (info.launcher, info.rank, info.local_rank, info.world_size, info.address) == ("srun", 3, 1, 4, "node7")
    assert 20000 <= info.port < 32000


def test_srun_steps_of_one_job_have_ports_of_their_own():
    assert find_rank_info(SRUN).port != find_rank_info(SRUN | {"SLURM_STEP_ID": "3"}).port


def test_a_batch_script_is_not_a_task():
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert find_rank_info(script) is None


def test_the_first_host_comes_from_scontrol(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_rank_info(SRUN | {"SLURM_STEP_NODELIST": "node[7-8]"}).address == "node7"


def test_without_scontrol_nothing_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="scontrol is not in PATH.*set MASTER_ADDR"):
        find_rank_info(SRUN | {"SLURM_STEP_NODELIST": "node[7-8]"})


def test_master_variables_override_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    info = find_rank_info(SRUN | {"SLURM_STEP_NODELIST": "node[7-8]", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (info.address, info.port) == ("10.0.0.1", 1234)


def test_another_world_size_is_refused_with_the_arithmetic():
    layout = LayoutConfig(tensor_parallel=2, pipeline_parallel=2, data_parallel=2)
    check_world(RankInfo("torchrun", 0, 0, 8, "h", 1), layout)
    with pytest.raises(ConfigError) as error:
        check_world(RankInfo("srun", 0, 0, 12, "h", 1), layout)
    text = str(error.value)
    assert "tensor 2 x pipeline 2 x context 1 x data 2 = 8 ranks, but srun started 12" in text
    assert "start 8 processes (srun --ntasks), or set layout.data_parallel=3" in text
    with pytest.raises(ConfigError) as error:
        check_world(RankInfo("torchrun", 0, 0, 6, "h", 1), layout)
    assert "data_parallel=" not in str(error.value)
    with pytest.raises(ConfigError, match="srun started 1; .*or, to start the ranks on this machine, give --local"):
        check_world(RankInfo("srun", 0, 0, 1, "h", 1), layout)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_STEP_ID": "4294967290"},  # salloc, with LaunchParameters=use_interactive_step
        {"SLURM_STEP_ID": "4294967291"},  # the batch script
        {"SLURM_NTASKS": "1", "SLURM_PTY_PORT": "4000", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_a_shell_in_a_step_is_no_rank(shell):
    assert find_rank_info(SRUN | shell) is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE; .*give --local, or unset RANK and WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE is set, but not RANK"),
        (
            {"TORCHELASTIC_RUN_ID": "x"},
            "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set .*unset TORCHELASTIC_RUN_ID, ",
        ),
        (TORCHRUN | {"RANK": "x"}, "RANK='x' is not a number from 0 to 7"),
        (TORCHRUN | {"RANK": "8"}, "RANK='8' is not a number from 0 to 7; .*give --local"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE not set"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a number from 1 to 65535"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID='4' is not a number from 0 to 3; .*unset SLURM_PROCID"),
        (SRUN | {"SLURM_STEP_ID": ""}, "SLURM_STEP_ID='' is not a number"),
        (SRUN | {"SLURM_NTASKS": ""}, "SLURM_STEP_NUM_TASKS and SLURM_NTASKS are not set"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun started 8 processes .*torchrun or srun; .*--local"),
    ],
)
def test_variables_left_over_or_half_set_name_the_way_out(variables, said):
    with pytest.raises(ConfigError, match=said):
        find_rank_info(variables)
