"""Published figures that come with the package, and when a measured one is near enough."""

from __future__ import annotations

import pytest

from llada_megatron.launch.evaluation.published import PUBLISHED, PublishedRow, Verdict, load_published
from llada_megatron.llada_moe.errors import ConfigError


@pytest.mark.parametrize("name", PUBLISHED.names())
def test_files_that_come_with_the_package(name):
    published = load_published(name)
    assert published.rows and published.chat_template == name.endswith("instruct")
    for row in published.rows:
        assert row.metrics and all(0 < figure < 100 for figure in row.figures)
        assert row.samples % row.stratum == 0
        assert row.new_tokens is None or row.new_tokens % (row.block_length or row.new_tokens) == 0
    assert published.of_tasks([]) == published.rows
    with pytest.raises(ConfigError, match="--tasks none: nothing published for LLaDA-8B"):
        published.of_tasks(["none"])


def test_a_figure_is_accepted_within_a_point_or_two_standard_errors_of_one_that_was_published():
    row = PublishedRow(task="t", figures=[60.0, 70.0], metrics=["acc", "exact_match,strict"], shots=0)

    def accepted(**metrics):
        return Verdict.of(row, {name.replace("__", ","): value for name, value in metrics.items()}).accepted

    assert accepted(acc__none=0.609) and accepted(acc__none=0.691)
    assert not accepted(acc__none=0.611)
    assert accepted(acc__none=0.65, acc_stderr__none=0.03)
    assert not accepted(acc__none=0.65, acc_stderr__none="N/A")
    assert accepted(acc__none=0.2, exact_match__strict=0.7)
    with pytest.raises(ConfigError, match="lm_eval gave none of acc, exact_match,strict"):
        accepted(acc__other=0.6)
