"""The results on disk: what a killed process leaves is read, and figures of another machine are not mixed in."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.results_file import Measurement, ResultsFile

HERE = Machine("a CPU (x86_64)", 0, 0, "2.11.0")
FIRST = Measurement("loss", "first", {"memory": 0.5, "where": "there"}, 1.0)


@pytest.fixture
def results(tmp_path):
    made = ResultsFile(tmp_path / "new" / "bench.jsonl")
    made.open_for(HERE)
    return made


def test_what_was_written_is_read_in_order_and_the_last_of_a_name_counts(results):
    failed = Measurement("loss", "second", {}, 1.0, "out of memory")
    mended = Measurement("loss", "second", {"memory": 0.25}, 2.0)
    for each in (FIRST, failed, mended):
        results.add(each)
    results.open_for(HERE)
    known = results.read()
    assert known.of("loss") == [FIRST, mended]
    assert known.figure("loss", "second", "memory") == 0.25 and known.figure("loss", "third", "memory") is None


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_half_a_line_of_a_killed_process_costs_that_line_only(results, cut):
    results.add(FIRST)
    results.add(Measurement("loss", "second", {"memory": 0.25}, 2.0))
    results.path.write_bytes(results.path.read_bytes()[:-cut])
    results.add(Measurement("loss", "third", {"memory": 0.125}, 2.0))
    names = [each.name for each in results.read().of("loss")]
    assert names in (["first", "third"], ["first", "second", "third"])
    assert ("second" in names) == (cut == 1)  # the line's end alone was lost


def test_a_part_is_under_way_from_its_begin_to_its_end_and_can_be_planned_anew(results):
    results.begin("loss")
    assert results.read().begun.keys() == {"loss"}
    results.end("loss", "cut", "late")
    assert results.read().begun == {} and results.read().ends == {"loss": ("cut", "late")}
    results.plan("loss")
    assert results.read().ends == {}


def test_figures_of_other_code_stay_with_a_word_and_the_file_says_from_where_on_it_is_new(results, capsys):
    results.add(FIRST)
    results.open_for(dataclasses.replace(HERE, code="abc"))
    assert "holds figures of the code None, which stay, and this is abc" in capsys.readouterr().err
    results.open_for(dataclasses.replace(HERE, code="abc"))
    assert capsys.readouterr().err == "" and results.read().of("loss") == [FIRST]
    assert results.path.read_text().count('"kind": "machine"') == 2


def test_another_machines_figures_are_refused(results):
    other = Machine("NVIDIA H100 80GB HBM3", 85 * 10**9, 90, "2.11.0")
    with pytest.raises(ConfigError, match=r"bench.jsonl holds figures of a CPU .* and this is NVIDIA H100 .* --output"):
        results.open_for(other)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(ConfigError, match="holds no results of `llada bench gpu`"):
        ResultsFile(tmp_path / "notes.txt").open_for(HERE)
    assert (tmp_path / "notes.txt").read_text() == "mine\n"
