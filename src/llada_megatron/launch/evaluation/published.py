"""Published figures of a model with the settings they were measured by, and whether a checkpoint comes near to them.

The files are in configs/published. `llada eval harness CHECKPOINT --published NAME` measures every row of one: whoever
has converted the weights can so accept or reject the conversion and the sampler with one command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llada_megatron.llada_moe.config.named import Named
from llada_megatron.llada_moe.config.parsing import parse
from llada_megatron.llada_moe.errors import ConfigError

PUBLISHED = Named("list of published figures", "published")
NEAR = 1.0
"""Percentage points: measured figures differ by as much between library versions and precisions. No standard
error is added: it is over documents, and the authors measured the same ones."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One task of lm_eval, and what its authors measured, in percent."""

    task: str
    figures: list[float]
    """Several where it was measured in several ways; a figure near to one of them is accepted."""
    metrics: list[str]
    """As lm_eval names them; several where its authors do not say which one they report."""
    shots: int
    samples: int = 128
    """Of the bound, as `stratum`; read for tasks with options."""
    stratum: int = 8
    guidance: float = 0.0
    new_tokens: int | None = None
    """Length of an answer that is written, one token a step at temperature 0; null = options are scored."""
    block_length: int | None = None
    """null = one block."""

    @property
    def settings(self) -> str:
        """In a few words."""
        words = [f"{self.shots} shots"]
        if self.new_tokens is None:
            words.append(f"{self.samples} samples")
        else:
            words.append(f"{self.new_tokens} tokens in blocks of {self.block_length or self.new_tokens}")
        return ", ".join(words) + (f", guidance {self.guidance:g}" if self.guidance else "")


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    """What is known of one model."""

    model: str
    source: str
    """Where the figures are from, and how far the tasks are the authors' own."""
    chat_template: bool = False
    rows: list[PublishedRow] = field(default_factory=list)

    def of_tasks(self, tasks: Sequence[str]) -> list[PublishedRow]:
        """The rows of these tasks; of none given, all. Raises ConfigError: a task without a row."""
        known = list(dict.fromkeys(row.task for row in self.rows))
        missing = [task for task in tasks if task not in known]
        if missing:
            raise ConfigError(f"--tasks {','.join(missing)}: nothing published for {self.model}; {', '.join(known)}")
        return [row for row in self.rows if not tasks or row.task in tasks]


def load_published(name_or_path: str) -> PublishedFigures:
    """The figures in `configs/published/NAME.yaml` or in a YAML file.

    Raises:
        ConfigError: with file, line, key and what to change; an unknown name lists the known ones.
    """
    figures, _ = parse(PublishedFigures, PUBLISHED.load(name_or_path))
    return figures


@dataclass(frozen=True)
class Verdict:
    """A row, and what was measured, in percent."""

    row: PublishedRow
    measured: dict[str, float]
    """By metric."""
    errors: dict[str, float]
    """Standard errors, where lm_eval gives them."""
    whole: bool = True
    """Whether all documents were measured, as the authors did; a figure of some of them decides nothing."""

    @classmethod
    def of(cls, row: PublishedRow, metrics: Mapping[str, Any], whole: bool = True) -> Verdict:
        """From the metrics of a task in the results of lm_eval, which may have none of the row's."""
        given = {name: metrics.get(_key(name)) for name in row.metrics}
        measured = {name: 100 * value for name, value in given.items() if isinstance(value, int | float)}
        errors = {name: metrics.get(_key(name, "_stderr")) for name in measured}
        return cls(row, measured, {n: 100 * e for n, e in errors.items() if isinstance(e, int | float)}, whole)

    @property
    def verdict(self) -> str:
        """`accepted`: a measured figure is within `NEAR` points of a published one, and each of them is a number."""
        if not self.measured:
            return "not measured"
        if not all(map(math.isfinite, self.measured.values())):
            return "rejected"
        if not self.whole:
            return "not decided"
        near = any(abs(value - figure) <= NEAR for value in self.measured.values() for figure in self.row.figures)
        return "accepted" if near else "rejected"

    @property
    def accepted(self) -> bool:
        """Whether the figure is met."""
        return self.verdict == "accepted"

    def record(self) -> dict[str, Any]:
        """As plain values."""
        found = {"measured": self.measured, "errors": self.errors, "verdict": self.verdict, "accepted": self.accepted}
        return {**vars(self.row), **found}

    def __str__(self) -> str:
        """In one line."""
        errors = {name: f" ± {error:.1f}" for name, error in self.errors.items()}
        found = ", ".join(f"{name} {value:.1f}{errors.get(name, '')}" for name, value in self.measured.items())
        published = " or ".join(f"{figure:g}" for figure in self.row.figures)
        if not self.measured:
            found = f"lm_eval gave none of {', '.join(self.row.metrics)}"
        verdict = self.verdict.upper() if self.verdict == "rejected" else self.verdict
        return f"{verdict:<12} {self.row.task:<28} {self.row.settings:<36} published {published:<12} {found}"


def _key(metric: str, suffix: str = "") -> str:
    """`acc` is `acc,none` in results; `exact_match,strict-match` says its filter itself."""
    name, _, way = metric.partition(",")
    return f"{name}{suffix},{way or 'none'}"
