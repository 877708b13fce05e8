"""Functions of tensors that torch compiles into as few kernels as it can, where there is a GPU to compile for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def for_any_rows(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function`, compiled for any number of rows of its tensors' first axis from two on.

    Each further width is compiled once more, up to some eight in a process, and then for all at once. What the compiled
    function computes in bfloat16 is rounded once, when it is written.

    Args:
        device: the type of the tensors' device. The function itself is returned for a CPU, where compiling costs more
            than it saves, and for tensors without data on a machine without a GPU.
    """
    if not _compiles(device):
        return function
    compiled = torch.compile(function)

    def run(*tensors: torch.Tensor) -> Any:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*tensors)

    return run


def _compiles(device: str) -> bool:
    return device == "cuda" and torch.cuda.device_count() > 0
