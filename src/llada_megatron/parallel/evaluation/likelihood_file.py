"""Scoring the lines of a file on all ranks, each result on disk before the next ones are begun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.estimators import estimate
from llada_megatron.llada_moe.evaluation.likelihood_scores import record_of, summarised, together
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.scored_lines import ScoredLine, known_ids
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.evaluation.query_scorer import QueryScorer, kind_of

TOGETHER = 32
"""Lines that are scored before their results are written."""


def score_lines(
    loaded: LoadedModel,
    tokenizer: Tokenizer | None,
    lines: Sequence[ScoredLine],
    protocol: LikelihoodProtocol,
    positions: int,
) -> Iterator[list[dict[str, Any]]]:
    """Records of all lines, `TOGETHER` at a time. Collective: every rank gives the same lines and consumes all.

    Every line is read as token ids before the first is scored, so that a line which cannot be scored costs nothing.

    Raises:
        ConfigError: the protocol or the layout is not one of the model.
        DataError: a line that cannot be scored, with its number.
    """
    kind, model = kind_of(loaded), loaded.run.model
    protocol = protocol.of_model(kind.fills_masks, kind.verifies)
    every = [line.pairs(tokenizer, kind, model.max_sequence_length, model.eos_token_id) for line in lines]
    known_ids([pair for line in every for answer in line for pair in answer], model.vocab_size)
    scorer = QueryScorer(loaded, protocol.guidance, positions)
    for start in range(0, len(lines), TOGETHER):
        some, cut = lines[start : start + TOGETHER], every[start : start + TOGETHER]
        flat = [pair for line in cut for answer in line for pair in answer]
        found = iter(estimate(scorer, flat, protocol, kind))
        each = [[together([next(found) for _ in answer]) for answer in line] for line in cut]
        yield [record_of(line, estimates) for line, estimates in zip(some, each, strict=True)]


class LikelihoodFile:
    """Results as lines of JSON below a line that says how they were measured; an interrupted file is continued."""

    def __init__(self, path: Path, protocol: dict[str, Any], overwrite: bool = False) -> None:
        """Read what is there, or begin the file.

        Args:
            path: of the file, which need not exist.
            protocol: what a file must begin with in order to be continued.
            overwrite: begin anew.

        Raises:
            ConfigError: the file holds results of another protocol, checkpoint or input.
            DataError: it cannot be read or written, or holds something else.
        """
        self.path, self._protocol = path, protocol
        self.records: list[dict[str, Any]] = []
        try:
            if not overwrite and path.exists():
                self._read()
            if overwrite or not path.exists() or not path.stat().st_size:
                path.write_text(json.dumps({"protocol": protocol}) + "\n", "utf-8")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write results to the end of the file."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in records)
        self.records += records

    def _read(self) -> None:
        """The results so far; a last line that was cut off is removed."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        try:
            head, *records = [json.loads(line) for line in content[:end].splitlines()] or [{"protocol": self._protocol}]
            found, self.records = dict(head["protocol"]), [dict(each) for each in records]
            summarised({each["number"]: each for each in self.records}.values())  # nothing is missing
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise DataError(f"{self.path}: not a file of results ({error}); give another, or --overwrite") from error
        if found != self._protocol:
            differ = [key for key in {**self._protocol, **found} if found.get(key) != self._protocol.get(key)]
            raise ConfigError(
                f"{self.path}: its results were measured otherwise ({', '.join(differ)}); give another file, "
                "or --overwrite"
            )
        if end < len(content):
            os.truncate(self.path, end)
