"""How the tensors of a checkpoint compare with those of its model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llada_megatron.llada_moe.errors import CheckpointError

_MOST_NAMES = 5


@dataclass
class Findings:
    """Names of tensors, by what is wrong with them."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    """Each with its name, the expected and the found shape."""
    notes: list[str] = field(default_factory=list)
    """What is left out on purpose."""

    def faults(self) -> Iterator[str]:
        """One line per kind of fault, with the first few names."""
        for words, names in (
            ("missing", self.missing),
            ("not of this model", self.extra),
            ("of a wrong shape", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                count = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
                yield f"{count} {words}: {', '.join(names[:_MOST_NAMES])}{more}"

    def require_none(self, directory: Path, what: str) -> list[str]:
        """The notes. Raises CheckpointError: there are faults."""
        faults = list(self.faults())
        if faults:
            raise CheckpointError(f"{directory} does not hold {what}: {'; '.join(faults)}")
        return self.notes
