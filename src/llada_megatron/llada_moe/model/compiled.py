"""Functions of tensors that torch compiles into as few kernels as it can, where there is a GPU to compile for."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Hashable
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


_numbers = itertools.count()


@functools.cache
def of_a_kind(function: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
    """`function`, compiled for calls of one kind, which differ in nothing but lengths; never run uncompiled.

    torch compiles a function for the first length, then for any, and for lengths that are so short that some size is 1.
    It keeps no more than eight of these (`recompile_limit`) for each code object, and runs the function itself after
    that, with no more than a line in the log. So each kind has a code object of its own, and the limit is an error.

    Raises:
        RuntimeError: (the returned function) its calls were of so many sorts that torch compiles no more of them.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    own = call.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")  # torch tells sizes apart by the name
    compiled = torch.compile(
        types.FunctionType(own, call.__globals__, own.co_name, None, call.__closure__), fullgraph=True
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"{function.__name__} was compiled for too many sorts of calls ({kind}), and is not run uncompiled, "
                "where it would keep the scores of all pairs of positions"
            ) from error

    return run


def _compiles(device: str) -> bool:
    return device == "cuda" and torch.cuda.device_count() > 0
