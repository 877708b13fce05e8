"""Other places for a run's metrics: `logging.callbacks` names classes that are told every reported line, on rank 0."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

KNOWN = {
    "wandb": "llada_megatron.parallel.training.wandb_metrics:WandbMetrics",
    "mlflow": "llada_megatron.parallel.training.mlflow_metrics:MlflowMetrics",
}
"""Short names, each of the library that it needs and of the extra that installs it."""

RETRY_S = 60.0
"""After a failure a callback is left alone for so long."""


class MetricsCallback:
    """What is told of a run's metrics, in the process of rank 0. A subclass overrides what it needs.

    An error in `start` ends the run before its first step. One in `log` or `end` is said in the log of rank 0, and
    training goes on. What they do takes time from training: long work belongs into a thread.
    """

    def start(self, run: RunConfig, first_step: int) -> None:
        """The run begins, or goes on: it is at step `first_step`, 0 for a new one. Its files are in run.output_dir."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, by name, as in metrics.jsonl; NaN where one is not known.

        Steps come in order, except that a run which goes back after a bad step reports those after it again.
        """

    def end(self) -> None:
        """The run is done, or was asked to stop. Not called where it fails."""


class Callbacks:
    """The callbacks of a run."""

    def __init__(self, run: RunConfig) -> None:
        """Raises ConfigError, as `find_callback`."""
        self._run = run
        self._callbacks = {name: find_callback(name)() for name in run.logging.callbacks}
        self._resting: dict[str, float] = {}
        self._started = False

    def start(self, first_step: int) -> None:
        """The run begins at `first_step`. Raises ResourceError: a callback cannot start, with its reason."""
        for name, callback in self._callbacks.items():
            try:
                callback.start(self._run, first_step)
            except Exception as error:
                reason = f"{type(error).__name__}: {_first_line(error)}"
                raise ResourceError(
                    f"logging.callbacks: {name} could not start ({reason}); take it out to train without it"
                ) from error
        self._started = True

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Tell all of lines with a `step`, as `MetricsWriter.flush` returns them."""
        told = [(line["step"], {k: v for k, v in line.items() if k not in ("schema", "step")}) for line in lines]
        for name, callback in self._callbacks.items():
            if time.monotonic() < self._resting.get(name, 0.0):
                continue
            try:
                for step, values in told:
                    callback.log(step, values)
            except Exception as error:
                _logger().warning("%s misses what comes in %.0f s: %s", name, RETRY_S, _first_line(error))
                self._resting[name] = time.monotonic() + RETRY_S

    def end(self) -> None:
        """The run is done."""
        for name, callback in self._callbacks.items() if self._started else ():
            try:
                callback.end()
            except Exception as error:
                _logger().warning("%s could not end: %s", name, _first_line(error))


def find_callback(name: str) -> type[MetricsCallback]:
    """The class that a short name, or `module:Class`, stands for.

    Raises:
        ConfigError: there is none, or its library is not installed.
    """
    if name in KNOWN and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"logging.callbacks: {name} is not installed; pip install 'llada-megatron[{name}]', or take it out"
        )
    module, colon, attribute = KNOWN.get(name, name).partition(":")
    if not colon:
        raise ConfigError(f"logging.callbacks: {name!r} is neither one of {', '.join(KNOWN)} nor module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(
            f"logging.callbacks: {name}: {module} cannot be imported ({error}); is it on PYTHONPATH?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, MetricsCallback)):
        raise ConfigError(f"logging.callbacks: {name}: no subclass of {__name__}:{MetricsCallback.__name__}")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
