"""Decisions on disk at once: OUTPUT_DIR/recovery.jsonl, so that a kill before the next checkpoint forgets none."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import from_dict
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.parallel.checkpoint.manifest import sync_directory
from llada_megatron.parallel.training.recovery.policy import Decision

FILE_NAME = "recovery.jsonl"


class DecisionLog:
    """One JSON object a decision, oldest first. One process reads and writes it."""

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / FILE_NAME

    def append(self, decision: Decision) -> None:
        """Write a decision down; it is on the disk when this returns.

        Raises:
            ResourceError: it cannot be written.
        """
        line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **dataclasses.asdict(decision)}) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            raise ResourceError(
                f"{self.path}: a decision could not be written down ({error.strerror}), and without that nothing is "
                "done about the bad step; make room, and run the same command again"
            ) from None

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # by a kill; the next line stands alone
        with self.path.open("ab") as file:
            file.write(b"\n" * cut + line)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.path.parent)

    def read(self) -> list[Decision]:
        """All decisions; a line cut short by a kill is left out.

        Raises:
            CheckpointError: a line is whole and no decision.
        """
        if not self.path.exists():
            return []
        lines = [_parse(line) for line in self.path.read_text("utf-8", errors="replace").splitlines()]
        try:
            return [from_dict(Decision, line) for line in lines if line is not None]
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}; put the line right, or remove it") from None

    def set_aside(self) -> None:
        """A run that begins anew does not take over the decisions of one that was here before."""
        if self.path.exists():
            self.path.replace(self.path.with_suffix(".jsonl.old"))


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return {key: value for key, value in line.items() if key != "time"} if isinstance(line, dict) else None
