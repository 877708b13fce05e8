"""Imports the samplers of other projects from clones on this disk; nothing of theirs is part of this one."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from llada_megatron.llada_moe.errors import ResourceError

FAST_DLLM, LLADA = "Fast-dLLM", "LLaDA"
URLS = {FAST_DLLM: "https://github.com/NVlabs/Fast-dLLM", LLADA: "https://github.com/ML-GSAI/LLaDA"}
_FOLDERS = {FAST_DLLM: ("llada", "v1/llada"), LLADA: (".",)}
_PACKAGE = "llada_megatron_peers"


@dataclass(frozen=True)
class PeerFiles:
    """The modules that the peers consist of."""

    llada: ModuleType
    """LLaDA's generate.py."""
    fast_dllm: ModuleType
    """Fast-dLLM's generate.py for LLaDA."""
    modeling: ModuleType
    """Fast-dLLM's modelling file, whose attention can read and write a cache."""


def import_peers(clones: Path) -> PeerFiles:
    """Import both projects from the folders `Fast-dLLM` and `LLaDA` of `clones`. This runs their code.

    Raises:
        ResourceError: a clone is missing, or a package that their files import.
    """
    fast, llada = (_find(clones, name) for name in (FAST_DLLM, LLADA))
    with _without_compilation():
        fast_package = _package(f"{_PACKAGE}.fast_dllm", fast)
        modeling = _import(f"{fast_package}.model.modeling_llada")
        _import("transformers").logging.set_verbosity_error()  # their model uses names that version 5 warns of
        with _also_known_as({"model": f"{fast_package}.model", "model.modeling_llada": modeling.__name__}):
            fast_dllm = _import(f"{fast_package}.generate")
        return PeerFiles(_import(f"{_package(f'{_PACKAGE}.llada', llada)}.generate"), fast_dllm, modeling)


def _find(clones: Path, name: str) -> Path:
    folders = [Path(clones) / name / folder for folder in _FOLDERS[name]]
    found = next((folder for folder in folders if (folder / "generate.py").is_file()), None)
    if found is None:
        raise ResourceError(
            f"{Path(clones) / name} holds no sampler of {name} (generate.py); run: "
            f"git clone {URLS[name]} {Path(clones) / name}"
        )
    return found


def _package(name: str, folder: Path) -> str:
    """Make `folder` a package of this name, so that its files can be imported without a place on the search path."""
    for part, path in ((_PACKAGE, []), (name, [str(folder.resolve())])):
        known = sys.modules.get(part)
        if known is None or list(known.__path__) != path:
            for stale in [module for module in sys.modules if module.startswith(f"{part}.")]:
                del sys.modules[stale]
            module = ModuleType(part)
            module.__path__ = path
            sys.modules[part] = module
    return name


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(_PACKAGE):
            raise ResourceError(f"the clone is incomplete ({error}); clone it anew") from error
        package = "'llada-megatron[dev]'" if error.name == "transformers" else error.name
        raise ResourceError(f"the peers need {error.name}, which is missing; run: pip install {package}") from error


@contextlib.contextmanager
def _also_known_as(names: dict[str, str]) -> Iterator[None]:
    """Let imported modules be found under other names for a while: their scripts run inside their own folder."""
    with mock.patch.dict(sys.modules, {name: sys.modules[module] for name, module in names.items()}):
        yield


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """Fast-dLLM compiles one call of torch's attention, which needs a C++ compiler here and fuses nothing."""

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    with mock.patch.object(torch, "compile", as_it_is):
        yield
