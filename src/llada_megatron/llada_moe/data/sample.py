"""A bounded, evenly spread part of a corpus to train a vocabulary on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llada_megatron.llada_moe.data.corpus import Source, chunks, documents, total_size
from llada_megatron.llada_moe.data.permutation import mix

VOCABULARY_SAMPLE = 32 << 20
"""Characters that a vocabulary is trained on at most (byte-pair training takes about 0.2 s per million)."""
_PIECE = 16 << 10
"""Characters of one piece of the sample."""
_EXPANSION = 4
"""Text bytes assumed per byte of a compressed file, when the share to keep is estimated."""


def sample_texts(sources: Sequence[Source], key: str, budget: int = VOCABULARY_SAMPLE) -> Iterator[str]:
    """All texts of a corpus within the budget of characters; of a larger one, pieces chosen by a hash of their number.

    They are spread over the whole corpus and the same in every run.
    """
    size = sum(
        total_size([source]) * (_EXPANSION if source.path.suffix in (".gz", ".zst") else 1) for source in sources
    )
    share = min(1.0, budget / size) if size else 1.0
    taken = number = 0
    for chunk in chunks(sources):
        for text in documents(chunk, key, []):
            for start in range(0, len(text), _PIECE):
                number += 1
                if share < 1.0 and mix(number) >= share * 2.0**64:
                    continue
                if taken >= 2 * budget:
                    return
                piece = text[start : start + _PIECE]
                taken += len(piece)
                yield piece
