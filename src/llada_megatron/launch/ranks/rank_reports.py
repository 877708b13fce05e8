"""The reports of ranks to their launcher, one small JSON file each: the result of rank 0, or why a rank failed."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_megatron import memory_ran_out
from llada_megatron.launch import files
from llada_megatron.llada_moe import errors

REPORTS_VARIABLE = "LLADA_REPORTS"
"""Environment variable with the directory of the reports."""

_LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    kind: str
    """Name of the exception's class."""
    message: str
    stack: str
    time: float
    """Seconds since the epoch."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The failure of `rank` because of `error`, at this moment."""
        stack = "".join(traceback.format_exception(error))
        error = memory_ran_out.recognised(error) or error
        return cls(rank, type(error).__name__, str(error).strip(), stack, time.time())

    @property
    def user_error(self) -> type[errors.LladaError] | None:
        """The class of an error that the user can act on; None for any other error."""
        found = getattr(errors, self.kind, None)
        return found if isinstance(found, type) and issubclass(found, errors.LladaError) else None

    @property
    def headline(self) -> str:
        """The exception in one line."""
        text = " ".join(self.message.split())
        return f"{self.kind}: {text[:_LONGEST_MESSAGE]}" if text else self.kind


def write_failure(directory: Path, failure: Failure) -> None:
    """Report the failure of a rank to the launcher."""
    files.replace(directory / f"failure-{failure.rank}.json", json.dumps(asdict(failure)))


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Report the result of rank 0 to the launcher."""
    files.replace(directory / "result.json", json.dumps(result))


def read_failures(directory: Path) -> list[Failure]:
    """All failures reported so far, the earliest first."""
    failures = [Failure(**json.loads(path.read_text("utf-8"))) for path in directory.glob("failure-*.json")]
    return sorted(failures, key=lambda failure: failure.time)


def read_result(directory: Path) -> dict[str, Any]:
    """The result of rank 0; empty where it has reported none."""
    path = directory / "result.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
