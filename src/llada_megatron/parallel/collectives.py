"""Actions that succeed on all ranks, or fail on all with the same error, so that no rank waits for one that failed.

All functions are collective over the world group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

from llada_megatron.llada_moe.errors import CheckpointError, LladaError, ResourceError

_T = TypeVar("_T")

_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


def on_rank_0(action: Callable[[], _T]) -> _T:
    """Run `action` on rank 0; all ranks return its result or raise its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except LladaError as error:
            outcome[1] = error
        except Exception as error:  # must reach the other ranks, which wait
            outcome[1] = as_error(explain(error))
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def agree(fault: str | None, kind: type[LladaError] = CheckpointError) -> None:
    """Raise an error of `kind` on all ranks if any of them has a fault, with the text of the first."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    first = next(filter(None, faults), None)
    if first is not None:
        raise kind(first)


def try_together(what: str, action: Callable[[], _T]) -> _T:
    """Run `action` on every rank; if it fails on any, all raise a CheckpointError that says `what` failed and why."""
    result, fault = None, None
    try:
        result = action()
    except LladaError as error:
        fault = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception; the other ranks wait
        fault = f"{what} failed: {explain(error)}"
    agree(fault)
    return result  # type: ignore[return-value]


def explain(error: BaseException) -> str:
    """One line for a failure, looking through the exceptions that torch wraps around an OSError."""
    failures = getattr(error, "failures", None)  # torch's CheckpointException: {rank: (exception, stack)}
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return os.strerror(seen.errno) + (f": {seen.filename}" if seen.filename else "")
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def as_error(text: str) -> LladaError:
    """A ResourceError if `text` is about a full disk, else a CheckpointError."""
    return (ResourceError if any(sign in text for sign in _FULL) else CheckpointError)(text)
