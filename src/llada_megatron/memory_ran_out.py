"""Memory that runs out outside of a training: the line that says what to lower, by the options of the command.

`parallel.training.out_of_memory` says more of a training, whose parts are known.
"""

from __future__ import annotations

import argparse
import re

from llada_megatron.llada_moe.errors import MemoryRanOutError

GENERAL = "take a smaller batch, shorter texts or a smaller model, or a machine with more memory"
_ON_THE_HOST = ("DefaultCPUAllocator", "Unable to allocate", "Cannot allocate memory", "std::bad_alloc")
"""How torch, numpy, the system and C++ begin to say it."""


def recognised(failure: BaseException) -> MemoryRanOutError | None:
    """What to say of an error by which memory of a GPU or of this machine ran out; None of any other error.

    torch is not imported: the errors of a GPU are known by the name of their class.
    """
    if isinstance(failure, MemoryRanOutError):
        return failure
    text = str(failure)
    on_gpu = any(kind.__name__ == "OutOfMemoryError" for kind in type(failure).__mro__)
    on_host = isinstance(failure, RuntimeError | OSError) and any(sign in text for sign in _ON_THE_HOST)
    if not (on_gpu or on_host or isinstance(failure, MemoryError)):
        return None
    asked = re.search(r"(?:[Tt]ried to|Unable to) allocate ([\d.]+ \w+)", text)
    wanted = f" when {asked[1]} more were asked for" if asked else ""
    return MemoryRanOutError(f"out of memory {'on the GPU' if on_gpu else 'on this machine'}{wanted}")


def what_to_lower(args: argparse.Namespace) -> str:
    """The options of a command that need less memory, in one clause."""
    given = vars(args)
    found = [
        f"a lower {option} (now {given[name]})"
        for name, option in (("batch_size", "--batch-size"), ("positions", "--positions"), ("length", "--length"))
        if (given.get(name) or 0) > 1
    ]
    if "max_new_tokens" in given and "spans" not in given:  # llada eval infill sets it, and has no such option
        found.append("a shorter text or a lower --max-new-tokens")
    if "workers" in given:
        found.append("fewer --workers")
    if "overrides" in given and ("batch_size" in given or "positions" in given):  # others run in one process
        found.append("the model spread over more ranks (layout.tensor_parallel=2)")
    if given.get("fp8", "") is None:
        found.append("--fp8 tensorwise on a GPU that has FP8 (the layers' weights take one byte each)")
    if "config" in given:
        found.append("a lower training.micro_batch_size, or a layout of more ranks")
    return f"take {'; or '.join(found)}" if found else GENERAL
