"""What a model is asked in order to score an answer: texts with masked positions, and the tokens expected there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """An answer, and the context that it follows. Token ids."""

    context: tuple[int, ...]
    answer: tuple[int, ...]
    question: int = 0
    """Pairs of one question share their masks, so far as their answers are equally long."""
    option: int = 0
    """Number of the pair within its question; it tells masks apart where they are not shared."""
    after: tuple[int, ...] = ()
    """What stands behind the answer. A block-causal model sees of it what lies in the answer's last block, an
    autoregressive one nothing."""
    window: int = 0
    """Number of the window of a whole text. Windows do not share masks: their estimates are added, and errors of the
    same draws would be added as well."""

    def fitted(self, longest: int) -> Pair:
        """The pair without as many tokens at its ends, far from the answer, as are too many for a model.

        Raises:
            DataError: the answer alone is longer than `longest` tokens.
        """
        if len(self.answer) > longest:
            raise DataError(f"an answer of {len(self.answer)} tokens; the model takes {longest}: cut the text shorter")
        room = longest - len(self.answer)
        after = self.after[: max(room // 2, room - len(self.context))]
        room -= len(after)
        return replace(self, context=self.context[max(0, len(self.context) - room) :], after=after)


@dataclass(frozen=True)
class Query:
    """One text that a model is run on, and what is asked of it."""

    tokens: tuple[int, ...]
    """`[seq]`, the mask token where something is masked."""
    rows: tuple[int, ...]
    """Positions whose logits are read, ascending."""
    labels: tuple[int, ...]
    """The token that each of the rows is to predict."""
    given: int
    """The first positions are the context, which guidance masks in a second copy of the text."""
    clean: tuple[int, ...] = ()
    """The text without masks, where several blocks of a block-causal model are asked at once: `[x_t ; x_0]`, in which
    each block of `tokens` sees itself and the clean blocks before it. Empty: `tokens` is all there is."""

    @property
    def positions(self) -> int:
        """That run, without the second copy of guidance."""
        return len(self.tokens) + len(self.clean)


Score = Callable[[Sequence[Query]], "list[Tensor]"]
"""For each query `[rows, 2]` float64: log-probability, in nats, of the label and of the most probable token."""


@dataclass(frozen=True)
class ModelKind:
    """What an estimator must know of a model."""

    mask_id: int
    fills_masks: bool
    """False: an autoregressive model, which predicts the next token."""
    block: int | None = None
    """Positions of a block that sees itself and all before, counted from the start of the text; None: all see all."""
    verifies: bool = False
    """A model that fills masks also predicts the next token, and reads causally what stands before a block of masks."""

    @property
    def predicts_next(self) -> bool:
        """Whether it learnt to predict each next token, for which the first needs a context."""
        return self.verifies or not self.fills_masks


@dataclass(frozen=True)
class AnswerPart:
    """The positions [first, stop) of an answer that lie in one block, and all tokens that they may see."""

    tokens: tuple[int, ...]
    first: int
    stop: int
    given: int
    behind_causal: bool = False
    """What stands before the part's block is read causally, as the clean half of `[x_t ; x_0]` alone is."""

    @property
    def length(self) -> int:
        """Positions that are scored."""
        return self.stop - self.first

    def query(self, masked: Sequence[int], mask_id: int, rows: Sequence[int] | None = None) -> Query:
        """Mask these positions, ascending, and ask about all of them, or about `rows` only."""
        tokens = list(self.tokens)
        for position in masked:
            tokens[position] = mask_id
        asked = tuple(masked if rows is None else rows)
        return Query(tuple(tokens), asked, tuple(self.tokens[row] for row in asked), self.given)


def parts(pair: Pair, block: int | None, behind_causal: bool = False) -> list[AnswerPart]:
    """The answer cut at the blocks of a block-causal model; of another model the whole answer is one part.

    `behind_causal`: of a model that reads causally what stands before a block (`ModelKind.verifies`).

    A part sees nothing behind its block. The last block is not filled up: the text ends where the pair ends.
    """
    text = (*pair.context, *pair.answer, *pair.after)
    given, stop = len(pair.context), len(pair.context) + len(pair.answer)
    if given == stop:
        return []
    if block is None:
        return [AnswerPart(text, given, stop, given)]
    cut = []
    for number in range(given // block, (stop - 1) // block + 1):
        end = (number + 1) * block
        cut.append(AnswerPart(text[:end], max(given, number * block), min(end, stop), given, behind_causal))
    return cut


@dataclass(frozen=True)
class PartQuery:
    """A query, and the numbers of the parts of an answer that it asks: its rows are theirs, one after the other."""

    query: Query
    parts: tuple[int, ...]
    counts: tuple[int, ...]
    """Rows of each part."""


def ask(
    own: Sequence[AnswerPart],
    masked: Mapping[int, Sequence[int]],
    mask_id: int,
    rows: Mapping[int, Sequence[int]] | None = None,
) -> list[PartQuery]:
    """Ask some parts of one answer: each by a query of its own, or all by one where that runs fewer positions or where
    only `[x_t ; x_0]` has what stands before a block as the model reads it.

    Args:
        own: all parts of the answer.
        masked: by the number of each part that is asked, in ascending order, the positions that are masked in it.
        mask_id: of the model.
        rows: which of them are asked about; None = all.
    """
    asked = masked if rows is None else rows
    whole = own[max(masked)].tokens if masked else ()
    together = any(own[b].behind_causal for b in masked)
    if not together and sum(len(own[b].tokens) for b in masked) <= 2 * len(whole):
        return [PartQuery(own[b].query(m, mask_id, asked[b]), (b,), (len(asked[b]),)) for b, m in masked.items()]
    tokens = list(whole)
    for position in (position for each in masked.values() for position in each):
        tokens[position] = mask_id
    read = tuple(row for b in masked for row in asked[b])
    query = Query(tuple(tokens), read, tuple(whole[row] for row in read), own[0].given, whole)
    return [PartQuery(query, tuple(masked), tuple(len(asked[b]) for b in masked))]


def next_token_query(pair: Pair) -> Query:
    """The query of an autoregressive model: each position is asked for the token behind it.

    Raises:
        DataError: the context is empty, and nothing predicts the first token.
    """
    if not pair.context:
        raise DataError("an autoregressive model needs a context before the first token, such as the end-of-text token")
    given = len(pair.context)
    rows = range(given - 1, given - 1 + len(pair.answer))
    return Query((*pair.context, *pair.answer), tuple(rows), pair.answer, given)


def rolling(tokens: Sequence[int], longest: int, prefix: int | None, question: int = 0) -> list[Pair]:
    """A whole text as pairs of at most `longest` tokens that together score each of its tokens once.

    All but the last are disjoint; the last is given as many earlier tokens as fit.

    Args:
        tokens: the text.
        longest: what the model takes.
        prefix: a token that stands before the text and is not scored (of an autoregressive model); None = none.
        question: of the pairs, which are numbered as its options.
    """
    before = () if prefix is None else (prefix,)
    at, found = 0, []
    while at < len(tokens):
        stop = min(len(tokens), at + longest - len(before))
        context = before if at == 0 else tuple(tokens[max(0, stop - longest) : at])
        found.append(Pair(context, tuple(tokens[at:stop]), question, len(found), window=len(found)))
        at = stop
    return found
