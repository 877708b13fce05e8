"""What a benchmark prints and returns: figures beside their goals, JSON with the keys that readers rely on."""

from __future__ import annotations

import argparse
import json
import math
import types

import pytest

from benchmarks import command
from llada_megatron import cli
from llada_megatron.tools import bench
from llada_megatron.tools.bench import at_least, at_most, format_table, parity, reported


def test_a_claim_holds_at_its_goal_and_not_beyond():
    assert at_least("speed", 1.2, "x", 1.2).holds and not at_least("speed", 1.19, "x", 1.2).holds
    assert at_most("error", 1e-5, "", 1e-5).holds and not at_most("error", 2e-5, "", 1e-5).holds
    assert at_most("error", math.nan, "", 1e-5).holds is False
    assert reported("tokens", 5.0, "tokens/s").holds is None


def test_a_claim_as_json_has_the_documented_keys():
    claim = at_least("speed", 1.3, "x", 1.2).to_dict()
    assert claim == {"claim": "speed", "value": 1.3, "unit": "x", "goal": ">= 1.2", "holds": True}


def test_the_table_shows_verdict_figure_goal_and_claim():
    text = format_table(
        [at_least("speed of one", 1.3, "x", 1.2), at_most("error", 1.0, "", 0.5), reported("t", 2, "s")]
    )
    header, good, bad, plain = text.splitlines()
    assert header.split() == ["measured", "goal", "claim"]
    assert good.split() == ["holds", "1.3", "x", ">=", "1.2", "speed", "of", "one"]
    assert bad.split()[0] == "FAILS" and plain.split() == ["2", "s", "reported", "t"]


def test_every_benchmark_explains_its_arguments():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for name in bench.BENCHMARKS:
        assert parser.parse_args([name]).benchmark == name


@pytest.mark.parametrize("options", [[], ["--faults", "3", "--work", "here", "--json"]])
def test_chaos_is_another_command_now(options, capsys):
    assert cli.main(["bench", "chaos", *options]) == 2
    said = capsys.readouterr().err
    now = " ".join(["python -m benchmarks.chaos", *options[:4]])
    assert said == f"error: `llada bench chaos` is now `{now}`, in the root of a checkout of the repository\n"


def test_a_run_prints_the_table_and_the_json_line_last(monkeypatch, capsys):
    claims = [at_least("speed", 1.0, "x", 1.2), reported("tokens", 5.0, "tokens/s")]
    monkeypatch.setattr(bench, "_module", lambda _: types.SimpleNamespace(run=lambda args: claims))
    assert bench.run(argparse.Namespace(benchmark="train", json=True, require=False)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("FAILS") and "1 of 2" in err
    result = json.loads(out.splitlines()[-1])
    assert result["claims"] == [claim.to_dict() for claim in claims]


@pytest.mark.parametrize(
    ("claim", "code"),
    [
        (at_least("speed", 1.2, "x", 1.2), 0),
        (at_least("speed", 1.0, "x", 1.2), 1),
        (at_most("error", math.nan, "", 1e-5), 1),
        (reported("tokens", 5.0, "tokens/s"), 0),
    ],
)
def test_a_goal_that_is_required_and_missed_is_a_failure(monkeypatch, claim, code):
    monkeypatch.setattr("llada_megatron.tools.bench.parity.run", lambda args: [claim])
    assert cli.main(["bench", "parity", "--require"]) == code
    assert cli.main(["bench", "parity"]) == 0


def test_a_benchmark_of_the_repository_can_be_required_as_well():
    missed = types.SimpleNamespace(
        __doc__="",
        __spec__=None,
        add_arguments=lambda parser: None,
        run=lambda args: [at_least("speed", 1.0, "x", 2.0)],
    )
    assert command.main("speed", missed, ["--require"]) == 1
    assert command.main("speed", missed, []) == 0


def test_a_name_that_no_case_of_parity_has_is_refused(capsys):
    assert cli.main(["bench", "parity", "--only", "TP3", "--require"]) == 2
    assert "--only TP3: no case has this in its name" in capsys.readouterr().err


def test_the_fast_part_of_parity_has_a_case_of_each_axis():
    layouts = {name: run.layout for name, run in parity.cases() if name in parity.FAST}
    assert len(layouts) == len(parity.FAST)
    assert all(layout.world_size == 2 for layout in layouts.values())
    axes = ("tensor", "pipeline", "context", "data", "expert", "expert_tensor")
    assert all(any(getattr(layout, f"{axis}_parallel") == 2 for layout in layouts.values()) for axis in axes)
