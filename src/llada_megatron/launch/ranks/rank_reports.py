"""What a rank tells its launcher: the result of rank 0, or why a rank failed. One small JSON file each."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron.launch import files
from llada_megatron.llada_moe import errors

REPORTS_VARIABLE = "LLADA_REPORTS"
"""Environment variable with the directory that a local launcher reads."""

_LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Failure:
    """Why a rank ended."""

    rank: int
    kind: str
    """Name of the exception's class."""
    message: str
    stack: str
    time: float
    """Seconds since the epoch."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The failure of `rank` by `error`, now."""
        stack = "".join(traceback.format_exception(error))
        return cls(rank, type(error).__name__, str(error).strip(), stack, time.time())

    @property
    def user_error(self) -> type[errors.LladaError] | None:
        """The class of an error that the user can act on, None for any other."""
        found = getattr(errors, self.kind, None)
        return found if isinstance(found, type) and issubclass(found, errors.LladaError) else None

    @property
    def headline(self) -> str:
        """The exception in one line."""
        text = " ".join(self.message.split())
        return f"{self.kind}: {text[:_LONGEST_MESSAGE]}" if text else self.kind


def write_failure(directory: Path, failure: Failure) -> None:
    """Leave the failure of a rank for the launcher."""
    files.replace(directory / f"failure-{failure.rank}.json", json.dumps(asdict(failure)))


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Leave the result of rank 0 for the launcher."""
    files.replace(directory / "result.json", json.dumps(result))


def read_failures(directory: Path) -> list[Failure]:
    """All failures reported so far, the earliest first."""
    failures = [Failure(**json.loads(path.read_text("utf-8"))) for path in directory.glob("failure-*.json")]
    return sorted(failures, key=lambda failure: failure.time)


def read_result(directory: Path) -> dict[str, Any]:
    """The result of rank 0; empty where it left none."""
    path = directory / "result.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
