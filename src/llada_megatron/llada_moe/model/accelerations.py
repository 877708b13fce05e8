"""Which optional GPU libraries a run uses, decided once, by importing them as Megatron-Core does.

Transformer Engine and NVIDIA's Apex replace Megatron's modules and optimizers as soon as they can be imported, also on
a machine without a GPU, where their optimizers fail (Transformer Engine's FusedAdam makes a CUDA tensor, and so does
Apex's). What a run cannot use is therefore hidden before Megatron is imported: `settle` does so, and everything else
asks what was settled.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version

from llada_megatron.llada_moe.model.grouped import GROUPED_MM

OLDEST_WHOLE_TRANSFORMER_ENGINE = Version("2.15")
"""Before it Megatron finds no `multi_tensor_scale_tensor` and clips gradients one parameter after the other."""
CUDNN_VARIABLES = ("CUDNN_HOME", "CUDNN_PATH")
"""Where Transformer Engine looks for cuDNN before everywhere else."""
_ROOTS = {
    "transformer_engine": ("transformer_engine", "transformer_engine_torch"),
    "apex": ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"),
}


@dataclass(frozen=True)
class Acceleration:
    """Whether an optional library is used, and what there is to say about it.

    Attributes:
        active: a run on this machine uses it.
        detail: what it is used for, or why it is not.
        version: of the installed distribution, None = not installed or not known.
    """

    active: bool
    detail: str
    version: str | None = None


_settled: dict[str, Acceleration] = {}


def transformer_engine_active() -> bool:
    """Whether Transformer Engine's modules are used."""
    return transformer_engine().active


def transformer_engine() -> Acceleration:
    """What was settled about Transformer Engine."""
    settle(torch.cuda.is_available())
    return _settled["transformer_engine"]


def apex() -> Acceleration:
    """What was settled about NVIDIA's Apex."""
    settle(torch.cuda.is_available())
    return _settled["apex"]


def settle(cuda: bool) -> None:
    """Decide what a run uses, and hide the rest from Megatron, whose modules must not be imported yet. Idempotent.

    Args:
        cuda: this process computes on CUDA.
    """
    if _settled:
        return
    decided = {"transformer_engine": decide_transformer_engine(cuda)}
    decided["apex"] = decide_apex(cuda, decided["transformer_engine"].active)
    _settled.update(decided)
    engine = decided["transformer_engine"].active
    if not engine:
        hide("transformer_engine")
    if not (cuda and (engine or decided["apex"].active)):
        hide("apex")


def decide_transformer_engine(cuda: bool) -> Acceleration:
    """Whether Transformer Engine is used: CUDA is there, and what Megatron imports of it can be imported."""
    if not present("transformer_engine"):
        return Acceleration(False, "not installed (docs/cluster.md has the two commands)")
    version = _version("transformer-engine")
    if not cuda:
        unknown = "it was not imported, so whether a machine with one could use it is not known"
        return Acceleration(False, f"installed, hidden from Megatron: no usable GPU; {unknown}", version)
    _load_cudnn_of_torch()
    try:
        importlib.import_module("transformer_engine.pytorch")
        fp8 = importlib.import_module("transformer_engine.pytorch.fp8")
        for name in ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"):  # extensions/transformer_engine.py:67
            getattr(fp8, name)
    except Exception as error:  # an extension built for another torch fails as ImportError, OSError or RuntimeError
        why = f"{type(error).__name__}: {_first_line(error)}"
        return Acceleration(
            False,
            f"installed, but its import fails: {why}; most likely it was built for another torch or CUDA than "
            f"{torch.__version__} (build it again with --no-build-isolation, docs/cluster.md)",
            version,
        )
    return Acceleration(True, _age(version), version)


def _load_cudnn_of_torch() -> None:
    """Let Transformer Engine use the cuDNN that torch's wheel brought, unless the environment names another.

    Both load it part by part as they need it, Transformer Engine from the system's folders first. Where those hold
    another version, the two mix in one process: symbols are missing, or torch refuses to work (seen on an H100: 9.14 in
    the system, 9.19 in the wheel). Parts that are loaded already are taken by their names.
    """
    if any(os.environ.get(name) for name in CUDNN_VARIABLES):
        return
    folder = Path(torch.__file__).parents[1] / "nvidia" / "cudnn"
    parts = sorted((folder / "lib").glob("libcudnn*.so.*"))
    if not parts:
        return
    os.environ[CUDNN_VARIABLES[0]] = str(folder)
    for part in parts:
        with contextlib.suppress(OSError):  # a part for GPUs that are not here may need what is not here
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)


def decide_flash_attention(cuda: bool, transformer_engine: bool) -> Acceleration:
    """Which flash-attn package can be chosen: only Transformer Engine's attention calls one, and it says which of those
    that are installed it takes."""
    versions = {number: _version(name) for number, name in _FLASH_ATTENTION.items()}
    installed = ", ".join(version for version in versions.values() if version)
    if not installed:
        return Acceleration(False, "not installed, not needed")
    if not cuda:
        return Acceleration(False, "installed, but there is no usable GPU", installed)
    if not transformer_engine:
        return Acceleration(False, "installed, but only Transformer Engine's attention calls it", installed)
    if os.environ.get("NVTE_FLASH_ATTN") == "0":
        return Acceleration(False, "installed, but NVTE_FLASH_ATTN=0 forbids it", installed)
    try:
        taken = importlib.import_module(f"{_DOT_PRODUCT_ATTENTION}.utils").FlashAttentionUtils
    except (ImportError, AttributeError):
        return Acceleration(False, "installed; whether this Transformer Engine takes it is not known", installed)
    capability = torch.cuda.get_device_capability()
    usable = [number for number in _by_preference(capability) if getattr(taken, _TAKEN[number], False)]
    if not usable:
        least = taken.version_required_blackwell if capability >= (10, 0) else taken.version_required
        accepted = f">= {least}, < {taken.max_version}"
        return Acceleration(False, f"installed, but Transformer Engine takes flash-attn {accepted} here", installed)
    if capability < (9, 0):
        return Acceleration(True, "Transformer Engine prefers it to cuDNN's attention on this GPU", versions[usable[0]])
    detail = "used where cuDNN's attention, which Transformer Engine prefers on this GPU, cannot serve"
    return Acceleration(True, detail, versions[usable[0]])


_FLASH_ATTENTION = {4: "flash-attn-4", 3: "flash-attn-3", 2: "flash-attn"}
"""Distributions of flash-attn by the number of its algorithm."""
_DOT_PRODUCT_ATTENTION = "transformer_engine.pytorch.attention.dot_product_attention"
_TAKEN = {4: "v4_is_installed", 3: "v3_is_installed", 2: "is_installed"}
"""What Transformer Engine remembers of those that it found and takes."""


def _by_preference(capability: tuple[int, int]) -> tuple[int, ...]:
    """Those that a GPU can run, first what Transformer Engine 2.20 prefers (`get_attention_backend`)."""
    if capability == (9, 0):
        return (3, 4, 2)
    return (4, 2) if capability > (9, 0) else (2,)


def decide_apex(cuda: bool, transformer_engine: bool) -> Acceleration:
    """Whether Megatron takes NVIDIA's Apex; the package named `apex` on the Python index is an unrelated one."""
    if not present("apex"):
        return Acceleration(False, "not installed, not needed")
    version = _version("apex")
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or []
    if not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders):
        return Acceleration(False, "the installed package `apex` is not NVIDIA's; uninstall it", version)
    if not present("amp_C"):
        return Acceleration(False, "NVIDIA's Apex is installed without its CUDA extensions (amp_C)", version)
    if not cuda:
        return Acceleration(False, "installed, hidden from Megatron: no usable GPU", version)
    if transformer_engine:
        return Acceleration(
            False, "installed; Megatron takes Transformer Engine's optimizer and norms instead", version
        )
    return Acceleration(True, "Adam, and the norm and scaling of gradients", version)


def present(module: str) -> bool:
    """Whether a top-level module could be imported, without importing it; hidden ones count as absent."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module in sys.modules without a spec
        return module in sys.modules


def hide(library: str) -> None:
    """Let every later import of the library and of its parts raise ImportError, if it is there."""
    for root in _ROOTS[library]:
        if not present(root):
            continue
        for name in [name for name in sys.modules if name.startswith(f"{root}.")]:
            sys.modules[name] = None  # type: ignore[assignment]
        sys.modules[root] = None  # type: ignore[assignment]


def in_words(found: Acceleration) -> str:
    """Version, and what it is used for or why it is not, in one clause."""
    return f"{found.version}: {found.detail}" if found.version else found.detail


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _age(version: str | None) -> str:
    where = "FP8 and float32" if GROUPED_MM is not None else "every precision"  # else torch's grouped_mm, in bfloat16
    used = f"linear layers, norms, optimizer, fused kernels, experts in {where}"
    try:
        old = version is not None and Version(version) < OLDEST_WHOLE_TRANSFORMER_ENGINE
    except InvalidVersion:
        old = False
    if not old:
        return used
    return (
        f"{used}; {version} is older than {OLDEST_WHOLE_TRANSFORMER_ENGINE} and has no fused clipping of gradients: "
        "Megatron falls back to a loop over the parameters that waits for the GPU at each"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else ""
