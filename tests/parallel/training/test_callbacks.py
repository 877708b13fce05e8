"""Classes that are told a run's metrics: found by name, told every line, unable to end a run once it goes."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.parallel.training import callbacks as module
from llada_megatron.parallel.training.callbacks import Callbacks, MetricsCallback, find_callback

LINES = [{"schema": 1, "step": 7, "loss": 2.5}, {"schema": 1, "step": 8, "loss": float("nan"), "tokens_per_second": 3}]


class Recorder(MetricsCallback):
    """Writes what it is told to told.jsonl in the run's folder."""

    def start(self, run, first_step):
        self._path = Path(run.output_dir) / "told.jsonl"
        self._tell("start", first_step)

    def log(self, step, values):
        self._tell(step, sorted(values))

    def end(self):
        self._tell("end", None)

    def _tell(self, what, more):
        with self._path.open("a") as stream:
            stream.write(json.dumps([what, more]) + "\n")


class Broken(MetricsCallback):
    """Cannot do anything but start."""

    def log(self, step, values):
        raise OSError("the server is away\nand more")

    end = log


class Unable(MetricsCallback):
    def start(self, run, first_step):
        raise RuntimeError("no API key\nconfigured")


def run_with(*names, output_dir="runs/x"):
    run = load_run("configs/runs/demo.yaml")
    logging_ = dataclasses.replace(
        run.logging, callbacks=[n if n in module.KNOWN else f"{__name__}:{n}" for n in names]
    )
    return dataclasses.replace(run, logging=logging_, output_dir=str(output_dir))


def test_one_that_fails_is_left_alone_for_a_while_and_the_others_go_on(tmp_path, caplog, monkeypatch):
    told = Callbacks(run_with("Broken", "Recorder", output_dir=tmp_path))
    told.end()  # before the start there is nothing to end
    told.start(6)
    with caplog.at_level(logging.WARNING):
        told.log(LINES)
        told.log(LINES[:1])
        assert [record.message for record in caplog.records] == [
            f"{__name__}:Broken misses what comes in 60 s: the server is away"
        ]
        monkeypatch.setattr(module.time, "monotonic", lambda: 1e12)
        told.log(LINES[:1])
        told.end()
    assert len(caplog.records) == 3 and "could not end" in caplog.records[-1].message
    lines = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert lines[:3] == [["start", 6], [7, ["loss"]], [8, ["loss", "tokens_per_second"]]]
    assert lines[3:] == [[7, ["loss"]], [7, ["loss"]], ["end", None]]


def test_one_that_cannot_start_ends_the_run_in_one_line():
    with pytest.raises(ResourceError, match=r"Unable could not start \(RuntimeError: no API key\); take it out"):
        Callbacks(run_with("Unable")).start(0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wandbb", "'wandbb' is neither one of wandb, mlflow nor module:Class"),
        ("no_such_module:Class", "no_such_module cannot be imported"),
        ("os:_exit", "no subclass of .*MetricsCallback"),
        ("json:JSONEncoder", "no subclass of .*MetricsCallback"),
    ],
)
def test_what_is_no_callback_is_refused_by_name(name, text):
    with pytest.raises(ConfigError, match=text):
        find_callback(name)


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llada-megatron\[mlflow\]'"):
        find_callback("mlflow")


class Wandb:
    """What of wandb is used: `init` returns the run."""

    def __init__(self):
        self.inits, self.logged, self.defined, self.finished = [], [], [], 0
        self.__spec__ = object()

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_one_run_over_restarts(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = run_with("wandb", output_dir=tmp_path)
    for first in (0, 6, 0):
        told = Callbacks(run)
        told.start(first)
        told.log(LINES[:1])
        told.end()
    ids = [options["id"] for options in wandb.inits]
    assert ids[0] == ids[1] != ids[2] and wandb.inits[0]["resume"] == "allow"
    assert wandb.inits[0]["config"]["training"]["steps"] == run.training.steps
    assert wandb.inits[0]["name"] == tmp_path.name and wandb.inits[0]["project"] == "llada-megatron"
    assert wandb.logged[0] == {"step": 7, "loss": 2.5} and ("*", "step") in wandb.defined and wandb.finished == 3


def test_mlflow_gets_one_run_over_restarts_and_numbers_only(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        __spec__=object(),
        start_run=lambda **options: (
            calls.append(("start", options)) or SimpleNamespace(info=SimpleNamespace(run_id="r1"))
        ),
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append(("metrics", step, values)),
        end_run=lambda: calls.append(("end",)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    run = run_with("mlflow", output_dir=tmp_path)
    for first in (0, 6):
        told = Callbacks(run)
        told.start(first)
        told.log(LINES)
        told.end()
    assert calls[0] == ("start", {"run_name": tmp_path.name})
    assert calls[1][1]["training.steps"] == str(run.training.steps)
    assert max(map(len, calls[1][1].values())) <= 500
    assert calls[2:5] == [("metrics", 7, {"loss": 2.5}), ("metrics", 8, {"tokens_per_second": 3.0}), ("end",)]
    assert calls[5] == ("start", {"run_id": "r1"}) and calls[6][0] == "metrics"
