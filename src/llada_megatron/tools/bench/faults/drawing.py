"""Which faults a run meets, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["killed rank", "killed node agent", "SIGTERM", "damaged checkpoint", "full disk", "NaN", "hang"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class PlannedFault:
    """One fault of the plan."""

    number: int
    kind: Kind
    step: int
    """It strikes once this step is done."""
    delay_s: float
    """So long after that step, to hit any moment of the next one."""
    during_save: bool
    """It waits for the next checkpoint that is being written."""
    victim: float
    """In [0, 1): which of the ranks or nodes."""


def draw(seed: int, count: int, spacing: int) -> list[PlannedFault]:
    """`count` faults, one at a random step of every `spacing` after the first; all kinds in turn, in random orders."""
    random_ = random.Random(seed)
    kinds = list(_in_turns(random_, count))
    return [
        PlannedFault(
            number=number,
            kind=kind,
            step=spacing * (number + 1) + random_.randrange(1, spacing),
            delay_s=random_.uniform(0, 0.4),
            during_save=random_.random() < 0.4,
            victim=random_.random(),
        )
        for number, kind in enumerate(kinds)
    ]


def _in_turns(random_: random.Random, count: int) -> Iterator[Kind]:
    """All kinds in a random order, then all of them again."""
    left: list[Kind] = []
    for _ in range(count):
        if not left:
            left = random_.sample(KINDS, len(KINDS))
        yield left.pop()
