"""A package `transformer_engine` that takes the constructor arguments of the real one, and computes nothing.

`tests/te_signatures.json` has the names and parameters (written by `benchmarks.te_signatures`). A constructor called
with a parameter that Transformer Engine does not have raises TypeError, as the real one does; modules hold weights of
the real shapes, on the device that they are given. `provide` puts the package before every other.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TABLE = json.loads(Path(__file__).with_name("te_signatures.json").read_text(encoding="utf-8"))
ROOT = "transformer_engine"


def provide(version: str = TABLE["version"], broken: str | None = None) -> importlib.abc.MetaPathFinder:
    """Make the package importable in this process, and return the finder, for `sys.meta_path.remove`.

    Args:
        broken: the message of the ImportError that its compiled part raises, as one built for another torch does.
    """
    finder = _Finder(version, broken)
    sys.meta_path.insert(0, finder)
    return finder


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, version: str, broken: str | None) -> None:
        self._version, self._broken = version, broken

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name in (ROOT, f"{ROOT}_torch") or any(
            module == name or module.startswith(f"{name}.") for module in TABLE["modules"]
        )
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self._broken and module.__name__ != ROOT:
            raise ImportError(self._broken)
        if module.__name__ == ROOT:
            module.__version__ = self._version
            for part in [f"{ROOT}.common", *([] if self._broken else TABLE["modules"])]:
                importlib.import_module(part)
        if module.__name__ == f"{ROOT}_torch":  # the compiled part, of which Megatron reads these names at import
            module.DType = enum.Enum("DType", ["kFloat4E2M1", "kFloat8E4M3", "kFloat8E5M2"])
        for name in TABLE["modules"].get(module.__name__, {}):
            setattr(module, name, _value(module.__name__, name))


def signature(module: str, name: str) -> inspect.Signature | None:
    """Of a function or constructor of the real package; None = not known."""
    parameters = next(iter(TABLE["modules"][module][name].values()))
    return _parsed(parameters) if parameters is not None else None


def forward(module: str, name: str) -> inspect.Signature:
    """Of a call of a module of the real package."""
    return _parsed(TABLE["modules"][module][name]["forward"])


def _parsed(parameters: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {parameters}: None"))


def _value(module: str, name: str) -> Any:
    entry = TABLE["modules"][module][name]
    if entry is None:
        return None
    if "class" in entry:
        return make_class(module, name)
    parameters = signature(module, name)
    if name in ("fp8_autocast", "fp8_model_init", "quantized_model_init"):
        return lambda *args, **kwargs: (parameters.bind(*args, **kwargs), contextlib.nullcontext())[1]

    def function(*args: Any, **kwargs: Any) -> Any:
        parameters.bind(*args, **kwargs)
        if name == "get_cpu_offload_context":
            return contextlib.nullcontext(), lambda tensor: tensor
        raise NotImplementedError(f"{module}.{name} of the stub computes nothing")

    return function


class _StateOfFP8(type):
    """FP8GlobalStateManager: whatever is asked, FP8 is off."""

    def __getattr__(cls, name: str) -> Callable[..., bool]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: False


class StubModule(torch.nn.Module):
    """A module that checks its arguments and keeps them as `arguments`."""

    signature: inspect.Signature | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.arguments = dict(self.signature.bind(self, *args, **kwargs).arguments)
        self.arguments |= self.arguments.pop("kwargs", {})
        self.make_weights(self.arguments)

    def make_weights(self, given: dict[str, Any]) -> None:
        """Register the parameters; none by default."""

    def add_weight(self, name: str, *shape: int) -> None:
        given = self.arguments
        dtype = given.get("params_dtype") or given.get("dtype") or torch.get_default_dtype()
        self.register_parameter(name, torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=given["device"])))


class StubLinear(StubModule):
    """`weight` `[out, in]`, or `weight0`, `weight1`, … of a GroupedLinear; this tensor rank's part."""

    def make_weights(self, given: dict[str, Any]) -> None:
        self.parallel_mode, self.sequence_parallel = given.get("parallel_mode"), given.get("sequence_parallel", False)
        self.fuse_wgrad_accumulation = given.get("fuse_wgrad_accumulation", False)
        self.use_bias, self.num_gemms = given.get("bias", True), given.get("num_gemms", 1)
        self.tp_size, self.save_original_input = given.get("tp_size", 1), given.get("save_original_input", False)
        rows, columns = given["out_features"], given["in_features"]
        rows //= self.tp_size if self.parallel_mode == "column" else 1
        columns //= self.tp_size if self.parallel_mode == "row" else 1
        for index in range(self.num_gemms):
            self.add_weight(f"weight{index}" if "num_gemms" in given else "weight", rows, columns)


class StubNorm(StubModule):
    """`weight` `[hidden]`."""

    def make_weights(self, given: dict[str, Any]) -> None:
        self.add_weight("weight", given.get("normalized_shape") or given["hidden_size"])
        self.weight.sequence_parallel = given.get("sequence_parallel", False)


_BASES = {"Linear": StubLinear, "GroupedLinear": StubLinear, "RMSNorm": StubNorm, "DotProductAttention": StubModule}


def make_class(module: str, name: str) -> type:
    """A class of the stub."""
    parameters = signature(module, name)
    if name == "FP8GlobalStateManager":
        return _StateOfFP8(name, (), {})
    if module == f"{ROOT}.pytorch" and name in _BASES:
        return type(name, (_BASES[name],), {"signature": parameters, "__module__": module})
    if name == "Format":
        return enum.Enum(name, ["E4M3", "E5M2", "HYBRID"])
    if name in ("FusedAdam", "FusedSGD"):
        return type(name, (), {"__init__": _without_gpu})
    if parameters is None:
        return type(name, (), {})

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        parameters.bind(self, *args, **kwargs)
        if isinstance(self, torch.nn.Module):
            torch.nn.Module.__init__(self)
        self.arguments = kwargs

    return type(name, (torch.nn.Module,) if module.startswith(f"{ROOT}.pytorch") else (), {"__init__": __init__})


def _without_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
    """FusedAdam makes a tensor on CUDA (fused_adam.py:193)."""
    raise RuntimeError("Found no NVIDIA driver on your system")
