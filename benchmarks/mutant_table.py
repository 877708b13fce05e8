"""The mutants: one wrong line each, and the few tests that are to notice it.

Ours, and not made by a tool such as mutmut or cosmic-ray: those change every operator of a file and run the whole suite
for each, hours of ranks for mutants most of which mean nothing; these say what could really be written wrong.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.mutant_groups import of_a_run, of_the_evaluation, of_the_model, of_the_planner

_EVERY = [*of_the_model.GROUPS, *of_a_run.GROUPS, *of_the_planner.GROUPS, *of_the_evaluation.GROUPS]


@dataclass(frozen=True)
class Mutant:
    """One change of one line, in the package."""

    area: str
    file: str
    """Path in `src/llada_megatron`."""
    old: str
    """Text that the file has once."""
    new: str
    tests: tuple[str, ...]
    """Words of a pytest command line."""

    def __str__(self) -> str:
        return f"{self.area}: {self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split()) or 'nothing'}"


def mutants() -> Iterator[Mutant]:
    """All of them, area by area."""
    for area, file, tests, changes in _EVERY:
        for old, new in changes:
            yield Mutant(area, file, old, new, tuple(shlex.split(tests)))
