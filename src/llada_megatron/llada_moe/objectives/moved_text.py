"""Rows whose text has moved inside its blocks, so that a model learns to delete and to insert (LLaDA2.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.diffusion.edit_script import Operations
    from llada_megatron.llada_moe.diffusion.noise import Moves, ReplacementVocabulary


@dataclass(frozen=True)
class Mover:
    """Takes tokens out of blocks, puts others in, and labels what is shown then by what it takes to put it right."""

    operations: Operations
    vocabulary: ReplacementVocabulary
    shown_weight: float
    """Of a position that shows no token of the text: a token too many, or a mask that fills up its block."""

    def moved(self, row: Row, moves: Moves, blocks: NDArray[np.int64], size: int) -> Row:
        """A masked sequence `[seq]` with moves; masks and weights go where their tokens go.

        Only whole blocks change: neither the last one of a document, if it is shorter, nor one that is cut.

        Args:
            row: its labels are the text.
            moves: of this sequence.
            blocks: `[seq]`, the number of each position's block.
            size: positions of a whole block.
        """
        import numpy as np

        from llada_megatron.llada_moe.diffusion.edit_script import arrange, edit_labels

        inside = np.arange(len(blocks)) < row.untruncated
        whole = (np.bincount(blocks, inside) == size)[blocks]
        draft = arrange(blocks, moves.missing & whole, moves.surplus & whole)
        kept = (draft.source >= 0) & ~draft.surplus
        additions = self.vocabulary.other(row.labels, moves.choice)
        inputs = np.where(draft.surplus, additions[draft.source], row.inputs[draft.source])
        inputs = np.where(draft.source < 0, self.operations.mask_id, inputs)
        weights = np.where(kept, row.weights[draft.source], np.float32(self.shown_weight))
        labels = row.labels.copy()
        texts = row.labels[whole].reshape(-1, size)
        labels[whole] = edit_labels(inputs[whole].reshape(-1, size), texts, self.operations).ravel()
        return replace(row, inputs=inputs, labels=labels, weights=weights)
