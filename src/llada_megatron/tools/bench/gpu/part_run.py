"""One part while it runs: measurements that are known are not repeated, a failed one does not end the others."""

from __future__ import annotations

import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import Part
from llada_megatron.tools.bench.gpu.results_file import DONE, Measurement, ResultsFile

CUT, FAILED = "cut", "failed"

_LONGEST = 800
"""Characters of an error in the results."""


class OutOfTimeError(Exception):
    """The part has used up its time."""


class BrokenContextError(Exception):
    """CUDA answers every call in this process with the same error from now on."""


@dataclass
class PartRun:
    """What a part's function works with."""

    part: Part
    results: ResultsFile
    machine: Machine
    deadline: float
    """Of time.monotonic(); no measurement begins later."""
    ENDS: ClassVar = (OutOfTimeError, BrokenContextError)
    """What a part must not catch."""

    @property
    def toy(self) -> bool:
        """Whether the sizes are to be those of a test."""
        return self.machine.toy

    def expect(self, names: Sequence[str]) -> None:
        """Write down what makes the part whole, so that a claim about all of it cannot hold for less."""
        self.results.expect(self.part.name, names)

    def known(self, name: str) -> dict[str, Any] | None:
        """Figures of an earlier start; None = to be measured, as what was not a number is."""
        found = self.results.read().measurements.get((self.part.name, name))
        return None if found is None or _lacking(found) else found.figures

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that are to be measured."""
        return [name for name in names if self.known(name) is None]

    def measure(self, name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
        """Call `work` unless its figures are known, and write down what it returns or why it failed.

        Returns:
            its figures, also those of an earlier start; None where it failed.

        Raises:
            OutOfTimeError: the part's time is over.
            BrokenContextError: the process must end.
        """
        known = self.known(name)
        if known is not None:
            return known
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        began = time.monotonic()
        try:
            figures = work(*arguments)
        except Exception as failure:
            self.failed(name, failure, time.monotonic() - began)
            return None
        self.results.add(Measurement(self.part.name, name, figures, round(time.monotonic() - began, 3)))
        shown = ", ".join(f"{key} {value:.5g}" for key, value in figures.items() if isinstance(value, int | float))
        message(f"{self.part.name}: {name}: {shown}")
        return figures

    def failed(self, name: str, failure: Exception, seconds: float = 0.0) -> None:
        """Write down why there are no figures, and make the memory free that the attempt held.

        Raises:
            BrokenContextError: the GPU does not answer this process any more.
        """
        text = in_one_line(failure)
        self.results.add(Measurement(self.part.name, name, {}, round(seconds, 3), text))
        message(f"{self.part.name}: {name}: failed: {text}")
        _drop_frames(failure)
        release_memory()
        if not answers():
            raise BrokenContextError(text) from failure


def in_one_line(failure: BaseException) -> str:
    """An error for the results: a user's as it is, any other with its class and the place it was raised at."""
    text = " ".join(str(failure).split())[:_LONGEST]
    if isinstance(failure, LladaError):
        return text
    frames = traceback.extract_tb(failure.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(failure).__name__}: {text}{place}"


def _drop_frames(failure: BaseException | None) -> None:
    """Empty the functions that an error and its causes came out of: they hold the tensors that did not fit."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__


def drop_graphs(models: Iterable[Any]) -> None:
    """Let models that are done with be freed.

    Megatron's token dispatcher keeps the routing of its last pass with its graph. The graph leads to the parameters,
    their hooks, and back to the dispatcher, through objects of C++ that Python's collector does not see into.
    """
    import torch

    for module in itertools.chain.from_iterable(model.modules() for model in models):
        dispatcher = getattr(module, "token_dispatcher", None)
        for name, value in list(vars(dispatcher).items()) if dispatcher is not None else []:
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, None)


def release_memory() -> None:
    """Give the memory of what nothing refers to back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answers() -> bool:
    """Whether the GPU still answers this process; true without one."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        return bool(torch.ones(8, device="cuda").sum().item() == 8)
    except Exception:  # whatever CUDA says now
        return False


def run_part(part: Part, results: ResultsFile, machine: Machine, until: float) -> None:
    """Run what of `part` is left to do, up to `until` (of time.monotonic()), and write down how it ended.

    Raises:
        BrokenContextError: as `PartRun.measure`; the part has been ended.
    """
    results.begin(part.name)
    began = time.monotonic()
    context = PartRun(part, results, machine, min(began + part.seconds, until))
    try:
        part.load()(context)
    except OutOfTimeError:
        results.end(part.name, CUT, f"its time was over after {time.monotonic() - began:.0f} s")
        message(f"{part.name}: cut after {time.monotonic() - began:.0f} s; what it measured until then counts")
    except BrokenContextError as failure:
        results.end(part.name, FAILED, f"the GPU stopped answering: {failure}")
        raise
    except Exception as failure:
        traceback.print_exc()
        results.end(part.name, FAILED, in_one_line(failure))
        message(f"{part.name}: failed: {in_one_line(failure)}")
        _drop_frames(failure)
        release_memory()
        if not answers():
            raise BrokenContextError(part.name) from None
    else:
        results.end(part.name, *_status(results, part))
    release_memory()  # not above: an error that is being handled holds what its functions held


def _lacking(found: Measurement) -> bool:
    """Whether it failed, or a figure of it is not a number."""
    return found.error is not None or any(value != value for value in found.figures.values())


def _status(results: ResultsFile, part: Part) -> tuple[str, str]:
    failures = [each.name for each in results.read().of(part.name) if _lacking(each)]
    return (FAILED, f"no figures: {', '.join(failures)}") if failures else (DONE, "")


def parts_left(known: Any, parts: Iterable[Part]) -> list[Part]:
    """Those of which something is left to do."""
    return [part for part in parts if known.ends.get(part.name, ("", ""))[0] != DONE]
