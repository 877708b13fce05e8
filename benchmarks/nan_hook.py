"""A NaN in a gradient of one rank, brought in from outside: nothing in the trainer knows of it.

`prepare` makes a folder with a copy of this file and a `sitecustomize.py` that calls `install`; the folder goes on
PYTHONPATH of a job. Every Python process of the job then wraps `TrainingStep.gradients` once that module is imported.
Where the file `request_path` is made, one rank writes one NaN into its share of the gradients of its next step.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_TARGET, _COPY = "llada_megatron.parallel.training.step", "llada_nan_hook"


def prepare(folder: Path) -> Path:
    """Fill `folder`, which is to go on PYTHONPATH; the job need not find the folder that this file is in."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / f"{_COPY}.py")
    text = f"from {_COPY} import install\n\ninstall({str(request_path(folder))!r})\n"
    (folder / "sitecustomize.py").write_text(text)
    return folder


def request_path(folder: Path) -> Path:
    """The file that requests a NaN; it is gone once a rank has taken the request."""
    return folder / "ask"


def install(request: str) -> None:
    """Wrap the trainer's gradients in this process, once it imports them."""
    sys.meta_path.insert(0, _Finder(Path(request)))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, request: Path) -> None:
        self._request = request

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _wrap(module, self._request)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, request: Path) -> None:
    gradients = module.TrainingStep.gradients

    def with_a_fault(self: Any, step: int, *rest: Any, **named: Any) -> Any:
        result = gradients(self, step, *rest, **named)
        with contextlib.suppress(OSError):
            request.unlink()  # succeeds in one rank only
            _spoil(self.models[0])
        return result

    module.TrainingStep.gradients = with_a_fault


def _spoil(model: Any) -> None:
    """One NaN in the shard of the first gradient bucket that this rank's optimizer reads."""
    buffer = (model.buffers + model.expert_parallel_buffers)[0]
    group = buffer.data_parallel_group
    buffer.buckets[0].grad_data.chunk(group.size())[group.rank()][0] = float("nan")
