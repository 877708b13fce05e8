"""A NaN in a gradient of one rank, brought in from outside: nothing in the trainer knows of it.

A folder with a `sitecustomize.py` that calls `install` goes on PYTHONPATH of a job (`prepare`). Every Python process
of the job then wraps `TrainingStep.gradients` once that module is imported. Whoever makes the file `ask_path` has one
rank write one NaN into its share of the gradients of its next step.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_TARGET = "llada_megatron.parallel.training.step"


def prepare(folder: Path) -> Path:
    """Write the `sitecustomize.py` into `folder`, which is to go on PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"from {__name__} import install\n\ninstall({str(ask_path(folder))!r})\n"
    (folder / "sitecustomize.py").write_text(text)
    return folder


def ask_path(folder: Path) -> Path:
    """The file that asks for a NaN; it is gone once a rank has taken the request."""
    return folder / "ask"


def install(ask: str) -> None:
    """Wrap the trainer's gradients in this process, once it imports them."""
    sys.meta_path.insert(0, _Finder(Path(ask)))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, ask: Path) -> None:
        self._ask = ask

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _wrap(module, self._ask)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, ask: Path) -> None:
    gradients = module.TrainingStep.gradients

    def with_a_fault(self: Any, step: int, *rest: Any, **named: Any) -> Any:
        result = gradients(self, step, *rest, **named)
        with contextlib.suppress(OSError):
            ask.unlink()  # succeeds in one rank only
            _spoil(self.models[0])
        return result

    module.TrainingStep.gradients = with_a_fault


def _spoil(model: Any) -> None:
    """One NaN in the shard of the first gradient bucket that this rank's optimizer reads."""
    buffer = (model.buffers + model.expert_parallel_buffers)[0]
    group = buffer.data_parallel_group
    buffer.buckets[0].grad_data.chunk(group.size())[group.rank()][0] = float("nan")
