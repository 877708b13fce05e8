"""`llada bench experts` counts the watchers' own time, and only theirs."""

import argparse
import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.tools.bench import expert_watching, train


def test_a_short_run_measures_hooks_and_reading(monkeypatch):
    monkeypatch.setitem(train.MODELS, "moe", dataclasses.replace(load_model("tiny-moe"), max_sequence_length=512))
    arguments = argparse.ArgumentParser()
    expert_watching.add_arguments(arguments)
    claims = expert_watching.run(arguments.parse_args(["--intervals", "1", "--steps", "1", "--sequences", "1"]))
    share, hooks, reading, step = (claim.value for claim in claims)
    assert 0 < hooks < 1e3 * step and reading > 0
    assert share == pytest.approx((hooks + reading) / (1e3 * step))


def test_only_hooks_that_came_later_are_timed():
    model, called = torch.nn.Linear(1, 1), []
    model.register_forward_hook(lambda *_: called.append("before"))
    known = expert_watching.hook_ids([model])
    model.register_forward_hook(lambda *_: called.append("after"))
    watch = expert_watching.Stopwatch()
    expert_watching.wrap_hooks([model], known, watch)
    hooks = list(model._forward_hooks.values())
    assert id(hooks[0]) in known and id(hooks[1]) not in known
    model(torch.zeros(1, 1))
    assert called == ["before", "after"] and watch.take() > 0 == watch.take()
