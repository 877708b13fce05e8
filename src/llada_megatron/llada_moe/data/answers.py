"""PREFIX.answers: which tokens of a prepared set of conversations are answers.

The file holds pairs of int64 (little endian), `[answers, 2]`: the first token of an answer and the one behind its last,
counted over the tokens of PREFIX.bin, ascending and without overlap. An answer goes from the first token that the
assistant says to the token that ends its turn. Each document is one conversation, with an end-of-text token behind it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.set_manifest import ANSWERS, SetManifest, prefix_file
from llada_megatron.llada_moe.errors import DataError

_PAIR = np.dtype("<i8").itemsize * 2


class AnswerFile:
    """The answers of a prepared set, mapped into memory."""

    def __init__(self, prefix: str | Path, manifest: SetManifest) -> None:
        """Open PREFIX.answers. Raises DataError: a set of plain text, or a file that is not of this manifest."""
        if manifest.chat is None:
            raise DataError(
                f"{prefix}: holds plain text, in which nothing is an answer; fine-tuning reads sets of "
                "`llada prepare --chat`"
            )
        path = prefix_file(prefix, ANSWERS)
        if not path.is_file() or path.stat().st_size != _PAIR * manifest.chat.answers:
            raise DataError(
                f"{path}: missing or not of this manifest ({manifest.chat.answers} answers); prepare the set again"
            )
        self.spans: NDArray[np.int64] = np.memmap(path, "<i8", mode="r").reshape(-1, 2)

    def within(self, begin: int, end: int) -> NDArray[np.int64]:
        """Answers of the document at tokens [begin, end), `[answers, 2]`, counted from its first token."""
        low, high = np.searchsorted(self.spans[:, 0], [begin, end])
        return np.array(self.spans[low:high]) - begin


class AnswerWriter:
    """Writes PREFIX.answers beside a set that is being written."""

    def __init__(self, prefix: Path) -> None:
        self._file = prefix_file(prefix, ANSWERS).open("wb")
        self.answers = self.tokens = 0

    def add(self, spans: list[tuple[int, int]], begin: int) -> None:
        """Append the answers of a document whose first token is number `begin` of the set."""
        self._file.write((np.array(spans, "<i8").reshape(-1, 2) + begin).tobytes())
        self.answers += len(spans)
        self.tokens += sum(stop - first for first, stop in spans)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
