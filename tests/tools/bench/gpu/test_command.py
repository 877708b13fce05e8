"""`llada bench gpu` as a user calls it: the plan, a part in a process of its own, and what it refuses."""

from __future__ import annotations

import json

import pytest

from llada_megatron import cli
from llada_megatron.tools.bench.gpu import measured_machine as machines
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import BY_NAME, PARTS, planned_seconds


def test_the_plan_names_every_part_and_its_seconds_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machines, "find_machine", lambda: pytest.fail("the machine was asked"))
    assert cli.main(["bench", "gpu", "--plan", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out.splitlines()[-1])["claims"]
    assert [row["claim"].partition(":")[0] for row in rows[:-1]] == list(BY_NAME)
    assert [row["value"] for row in rows] == [*(part.seconds for part in PARTS), planned_seconds(PARTS)]
    assert "nothing is run" in err and "estimates for one H100" in err
    assert list(tmp_path.iterdir()) == []


def test_a_part_runs_in_a_process_of_its_own_and_is_not_run_again(tmp_path, capsys):
    output = tmp_path / "bench.jsonl"
    command = ["bench", "gpu", "--only", "environment", "--output", str(output), "--json", "--require"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["benchmark"] == "gpu"
    assert "no GPU here: the figures are of a toy on a CPU" in err and "no claim about GPUs is judged" in err
    assert '"kind": "end", "part": "environment", "status": "done"' in output.read_text()
    assert "as trained: environment" in (tmp_path / "bench.log").read_text()
    first = output.read_text()
    assert cli.main(command) == 0
    assert output.read_text() == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--minutes", "0"], "between 0.5 and 600, found 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "gpu", *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_results_of_another_machine_are_not_mixed_with_this_ones(tmp_path, monkeypatch, capsys):
    output = tmp_path / "bench.jsonl"
    output.write_text(
        '{"kind": "machine", "device": "NVIDIA H200", "memory": 1, "capability": 90, "torch": "2.11.0"}\n'
    )
    monkeypatch.setattr(machines, "find_machine", lambda: Machine("a CPU (x86_64)", 0, 0, "2.11.0"))
    assert cli.main(["bench", "gpu", "--output", str(output)]) == 2
    assert "holds figures of NVIDIA H200 with torch 2.11.0" in capsys.readouterr().err
    assert cli.main(["bench", "gpu", "--output", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
