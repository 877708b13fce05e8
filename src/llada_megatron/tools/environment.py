"""`llada env`: versions, devices, and which accelerations are active and why not; what one pastes into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron import __version__
from llada_megatron.console import emit_json, visible

if TYPE_CHECKING:
    from llada_megatron.llada_moe.model.accelerations import Acceleration

EXAMPLES = """\
examples:
  llada env                                  paste this into a bug report
  llada env --json | tail -1                 the same as one JSON object"""
DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "apex",
    "numpy",
    "sentencepiece",
    "tokenizers",
)
VARIABLES = re.compile(
    r"(CUDA|NCCL|TORCH|PYTORCH|NVTE|GLOO|OMP|MKL|SLURM|LLADA|TE|UB)_\w+"
    r"|(MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|NO_COLOR|PYTHONPATH|VIRTUAL_ENV|CONDA_DEFAULT_ENV|LD_LIBRARY_PATH)"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CRED|AUTH|COOKIE|JWT|BEARER|SIGNATURE", re.IGNORECASE)
_SECRET_PARTS = re.compile(
    r"(?<=://)[^/@\s]+(?=@)"  # user and password of a URL; a token can stand in the place of either
    r"|(?<=[?&;])(?i:[\w-]*(?:token|key|secret|pass|pwd|cred|auth|sig)[\w-]*=)[^&;\s]+"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[bp]-|AKIA|ey[JI])[\w.-]{8,}"
)
"""Parts of a value that are secrets wherever they stand: in URLs, and tokens of well-known services."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`llada env` takes only the common options."""


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    for section, values in report.items():
        print(section.replace("_", " "))
        for name, value in values.items():
            print(f"  {name:<24}{visible(str(value)) if not isinstance(value, dict) else _acceleration(value)}")
    if args.json:
        emit_json(report)
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """The whole report, section by section."""
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "accelerations": active_accelerations(),
        "source": source_state(Path(__file__).resolve().parent),
        "environment": environment_variables(dict(os.environ)),
    }


def versions() -> dict[str, Any]:
    """Installed versions; None for what is not installed."""
    found: dict[str, Any] = {"llada-megatron": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Operating system, usable cores and memory of the host."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "executable": sys.executable,
        "cpu": _processor_name(),
        "usable cores": cores,
        "memory GB": round(memory.total / 1e9, 1),
        "available memory GB": round(memory.available / 1e9, 1),
    }


def devices() -> dict[str, Any]:
    """What torch computes on."""
    import torch

    if not torch.cuda.is_available():
        from llada_megatron.parallel.machine import driver_fault

        built = torch.version.cuda or torch.version.hip
        reason = driver_fault() or ("no usable GPU or driver" if built else "this torch is built without CUDA")
        return {"device": "cpu", "why not CUDA": reason, "threads": torch.get_num_threads()}
    found: dict[str, Any] = {"device": "cuda", "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, {capability}"
    return found


def active_accelerations() -> dict[str, dict[str, Any]]:
    """Each acceleration: whether a run on this machine uses it, and the detail or the reason why not."""
    import torch

    from llada_megatron.llada_moe.model import accelerations

    engine = accelerations.transformer_engine()
    cuda = torch.cuda.is_available()
    nccl = cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl_detail = (
        ".".join(map(str, torch.cuda.nccl.version())) if nccl else ("not in this torch" if cuda else "needs CUDA")
    )
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return {
        "NCCL": _state(nccl, nccl_detail),
        "gloo": _state(gloo, "communication between CPU ranks" if gloo else "not in this torch"),
        "transformer-engine": _library(engine),
        "apex": _library(accelerations.apex()),
        "flash-attn": _library(accelerations.decide_flash_attention(cuda, engine.active)),
        "grouped experts": grouped_experts_state(cuda, engine.active),
        "megatron index helpers": index_helpers_state(),
        "packed attention": attention_state(None, cuda, engine.active),
        "block-causal attention": attention_state(32, cuda, engine.active),
    }


def attention_state(block: int | None, cuda: bool, engine: bool) -> dict[str, Any]:
    """How a run in bf16 attends to the documents of a window, in causal blocks of `block` positions or in full."""
    import torch

    from llada_megatron.llada_moe.model.attention.backends import Backend, attention_backend
    from llada_megatron.llada_moe.model.patterns import AttentionPattern

    where = "cuda" if cuda else "cpu"
    chosen = attention_backend(AttentionPattern(block), where, torch.bfloat16, engine=engine)
    return _state(chosen.backend is not Backend.PER_DOCUMENT, f"{chosen.backend.value} ({chosen.reason})")


def grouped_experts_state(cuda: bool, transformer_engine: bool) -> dict[str, Any]:
    """Whether the routed experts of a rank are computed together, and by which library's product."""
    from llada_megatron.llada_moe.model.grouped import GROUPED_MM

    if not cuda:
        return _state(False, "one expert after the other on a CPU")
    if transformer_engine:
        theirs = "Transformer Engine's grouped product"
        ours = f"torch's grouped_mm in bfloat16, {theirs} in FP8 and float32"
        return _state(True, theirs if GROUPED_MM is None else ours)
    if GROUPED_MM is None:
        return _state(False, "one expert after the other: this torch has no grouped_mm")
    return _state(True, "torch's grouped_mm in bfloat16, one expert after the other in float32")


def index_helpers_state() -> dict[str, Any]:
    """Whether Megatron's compiled dataset helpers are there (looked up as a file: importing Megatron takes seconds)."""
    spec = importlib.util.find_spec("megatron")
    folders = list(spec.submodule_search_locations or []) if spec else []
    built = [file for folder in folders for file in Path(folder).glob("core/datasets/helpers_cpp*.so")]
    return _state(bool(built), "compiled" if built else "not compiled (a megatron-core wheel contains them)")


def source_state(folder: Path) -> dict[str, Any]:
    """Git commit of the installed source, and whether it has local changes."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Installed into an environment inside some other project, the commit found would be that project's.
    inside = git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is not None
    commit = git("rev-parse", "HEAD") if inside else None
    return {
        "commit": commit,
        "local changes": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
    }


def environment_variables(values: dict[str, str]) -> dict[str, str]:
    """The variables that steer a run, with what may be a secret left out."""
    chosen = {name: value for name, value in sorted(values.items()) if VARIABLES.fullmatch(name)}
    return {
        name: "<redacted>" if SECRET.search(name) else _SECRET_PARTS.sub("<redacted>", value)
        for name, value in chosen.items()
    }


def _library(found: Acceleration) -> dict[str, Any]:
    from llada_megatron.llada_moe.model.accelerations import in_words

    return _state(found.active, in_words(found))


def _state(active: bool, detail: str) -> dict[str, Any]:
    return {"active": bool(active), "detail": detail}


def _acceleration(state: dict[str, Any]) -> str:
    return f"{'active' if state['active'] else 'not active'}: {state['detail']}"


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.processor()
