"""How attention is computed here, and why so: the one place that chooses.

`attention_backend` answers without computing anything, for a run, for `llada env` and for benchmarks alike.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from llada_megatron.llada_moe.model.attention import varlen
from llada_megatron.llada_moe.model.patterns import AttentionPattern

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_ENGINE_HEAD_DIM, _ENGINE_HOPPER_HEAD_DIM = 128, 256  # the widest of cuDNN's kernels for packed documents
_VARLEN_HEAD_DIM = 256  # the widest head of the flash attention in torch
_FLEX_HEAD_DIM = 16  # the narrowest that its kernels tile


class Backend(enum.Enum):
    """A way to compute attention over packed documents."""

    PER_DOCUMENT = "scaled_dot_product_attention, document by document"
    ENGINE = "Transformer Engine, all documents in one call"
    VARLEN = "torch.nn.attention.varlen, all documents in one call"
    FLEX = "FlexAttention, all documents in one call"
    DECOMPOSED = "products of a noisy and a clean half, merged by their log-sum-exp"


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: Backend
    reason: str


@cache
def attention_backend(
    pattern: AttentionPattern,
    device: str,
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    engine: bool = False,
    split: bool = False,
) -> Choice:
    """The backend for attention over whole sequences.

    Args:
        pattern: who sees whom inside a document.
        device: type of the device, "cuda" or another.
        dtype: of queries, keys and values.
        head_dim: features of a head.
        engine: whether the model is built from Transformer Engine's modules.
        split: whether a rank holds the queries of a part of a sequence (context parallelism).
    """
    anywhere = Backend.DECOMPOSED if pattern.doubled else Backend.PER_DOCUMENT
    if device != "cuda":
        return Choice(anywhere, "kernels for packed documents need CUDA")
    if dtype not in _KERNEL_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return Choice(anywhere, f"kernels for packed documents take bfloat16 and float16, not {name}")
    missing = []
    for backend, find_obstacle in (
        (Backend.ENGINE, lambda: _against_engine(pattern, head_dim, engine, split)),
        (Backend.VARLEN, lambda: _against_varlen(pattern, head_dim)),  # asking imports torch's compiler: seconds
        (Backend.FLEX, lambda: _against_flex(head_dim, dtype)),
    ):
        obstacle = find_obstacle()
        if obstacle is None:
            return Choice(backend, "; ".join(missing) or "serves this pattern")
        missing.append(obstacle)
    return Choice(anywhere, "; ".join(missing))


def _against_engine(pattern: AttentionPattern, head_dim: int, engine: bool, split: bool) -> str | None:
    """Where cuDNN's kernel does not serve, Transformer Engine computes all scores, or calls flash-attn, whose kernel
    `varlen` has as well. Some versions serve more than is taken here: before compute capability 9.0 those of 2.20 with
    cuDNN 9.18.1, and wider heads on Blackwell (nvte_get_fused_attn_backend; sdpa of cudnn-frontend)."""
    if not engine:
        return "the model is not built from Transformer Engine"
    if pattern.doubled:
        return "Transformer Engine has no mask of a noisy and a clean half"
    if pattern.block not in (None, 1):
        return "Transformer Engine has no mask of causal blocks"
    if split and pattern.block == 1:
        return "Megatron's mask types for Transformer Engine have none for a causal document split over context ranks"
    hopper = (_capability() or (9, 0))[0] == 9
    widest = _ENGINE_HOPPER_HEAD_DIM if hopper else _ENGINE_HEAD_DIM
    name = "Transformer Engine's kernel for packed documents"
    return _too_old(name, (9, 0)) or _against_heads(name, head_dim, widest)


def _against_varlen(pattern: AttentionPattern, head_dim: int) -> str | None:
    if pattern.doubled:
        return "torch.nn.attention.varlen has no mask of a noisy and a clean half"
    if pattern.block not in (None, 1):
        return "torch.nn.attention.varlen has no mask of causal blocks"
    if varlen.operation() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 and later have)"
    name = "torch.nn.attention.varlen"
    return _against_heads(name, head_dim, _VARLEN_HEAD_DIM) or _too_old(name, (8, 0))


def _against_heads(name: str, head_dim: int, widest: int) -> str | None:
    if head_dim > widest:
        return f"{name} takes heads of up to {widest} features here, not {head_dim}"
    return f"{name} takes heads of a multiple of 8 features, not {head_dim}" if head_dim % 8 else None


def _against_flex(head_dim: int, dtype: torch.dtype) -> str | None:
    if head_dim < _FLEX_HEAD_DIM:
        return f"FlexAttention takes heads of {_FLEX_HEAD_DIM} features or more, not {head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled with Triton, which is not installed"
    # torch leaves bfloat16 uncompiled on older GPUs (its _check_triton_bf16_support), and Triton has none before 7.0
    needed = ("FlexAttention in bfloat16", (8, 0)) if dtype == torch.bfloat16 else ("FlexAttention", (7, 0))
    obstacle = _too_old(*needed) or _against_building()
    if obstacle is not None:
        return obstacle
    from torch.nn.attention.flex_attention import BlockMask

    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return f"FlexAttention of torch {torch.__version__} takes no lengths that its tiles do not divide"
    return None


def _against_building() -> str | None:
    """Triton builds a small library in C on each machine before it launches a kernel (its runtime/build.py)."""
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in (("gcc", "clang") if named is None else (named,))):
        found = "neither gcc nor clang is on PATH" if named is None else f"CC names '{named}', which is no program"
        return f"FlexAttention is compiled with Triton, which needs a C compiler: {found}"
    scheme = sysconfig.get_default_scheme()
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    if not header.is_file():
        return f"FlexAttention is compiled with Triton, which needs the headers of Python: there is no {header}"
    return None


def _too_old(name: str, needed: tuple[int, int]) -> str | None:
    capability = _capability()
    if capability is None or capability >= needed:
        return None
    return f"{name} needs compute capability {needed[0]}.{needed[1]}; this GPU has {capability[0]}.{capability[1]}"


def _capability() -> tuple[int, int] | None:
    """Of the current GPU; None where there is none to ask (tensors without data on a machine without a GPU)."""
    return torch.cuda.get_device_capability() if torch.cuda.device_count() else None


@cache
def told(chosen: Choice) -> None:
    """Say a choice in the log, once a process."""
    logging.getLogger(__name__).info("attention: %s (%s)", chosen.backend.value, chosen.reason)
