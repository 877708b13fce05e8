"""The table of mutants follows the code, so that `python -m benchmarks.mutants` can be run at any time."""

from pathlib import Path

import pytest

from benchmarks.mutant_table import mutants
from tests.documented import ROOT

ALL = list(mutants())
AREAS = {"noise", "objective", "attention", "router", "optimizer", "checkpoint", "resume", "editors", "conversion"}
NEWER = {"recovery", "sampling", "hang", "experts", "kernels", "planner", "evaluation"}


def test_there_are_enough_of_them_in_every_area():
    assert len(ALL) >= 60 and len({(each.file, each.old, each.new) for each in ALL}) == len(ALL)
    assert {each.area for each in ALL} == AREAS | NEWER


@pytest.mark.parametrize("each", ALL, ids=str)
def test_what_it_changes_and_the_tests_that_are_to_notice_are_there(each):
    text = Path(ROOT, "src/llada_megatron", each.file).read_text()
    assert text.count(each.old) == 1 and each.new != each.old
    compile(text.replace(each.old, each.new), each.file, "exec")  # a mutant that cannot be imported shows nothing
    named = [word for word in each.tests if word.startswith("tests/")]
    assert named and all(Path(ROOT, word).is_file() for word in named)
