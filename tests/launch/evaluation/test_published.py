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


def test_a_figure_is_accepted_within_a_point_of_one_that_was_published():
    row = PublishedRow(task="t", figures=[60.0, 70.0], metrics=["acc", "exact_match,strict"], shots=0)

    def verdict(whole=True, **metrics):
        found = Verdict.of(row, {name.replace("__", ","): value for name, value in metrics.items()}, whole)
        assert found.accepted == (found.verdict == "accepted") == found.record()["accepted"]
        return found.verdict

    assert verdict(acc__none=0.609) == verdict(acc__none=0.691) == "accepted"
    assert verdict(acc__none=0.611) == "rejected"
    assert verdict(acc__none=0.611, acc_stderr__none=0.03) == "rejected", "the documents are the authors' own"
    assert verdict(acc__none=0.611, acc_stderr__none="N/A") == "rejected"
    assert verdict(acc__none=0.2, exact_match__strict=0.7) == "accepted"
    assert verdict(acc__none=float("nan"), exact_match__strict=0.7) == "rejected"
    assert verdict(whole=False, acc__none=0.6) == verdict(whole=False, acc__none=0.2) == "not decided"
    assert verdict(whole=False, acc__none=float("nan")) == "rejected"
    assert verdict(acc__other=0.6) == verdict(acc__none="N/A") == "not measured"
    assert "lm_eval gave none of acc, exact_match,strict" in str(Verdict.of(row, {}))
