"""Texts that are written by self-speculation: drafts of masks behind a text, verified by the same model's causal pass.

A text has a prefix of known tokens, all of whose keys but the last one's are kept, computed causally. Two kinds of
passes take turns:

* drafting runs the last known token and a block of masks, which see each other and the text. The row of the last token
  gives the next one for certain; the rows of the masks guess those after it;
* verifying runs the guesses causally. The row of each gives what comes next, and as long as that is the following
  guess, it is known; so is the first token that is not. Masks behind the guesses draft the next block meanwhile, in
  case all of them are right.

Both read and write one cache: keys of known tokens are the same in either pass, and those of masks and of wrong guesses
are overwritten by the pass that runs these positions next. A known token is the most probable one of a causal row, or
the one drawn with the random numbers of its position: the text is that of decoding token by token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.windows import Window
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache
from llada_megatron.llada_moe.sampling.editors import Revision
from llada_megatron.llada_moe.sampling.loop import Finished, Method, SequenceGroup, Step
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, LogitRows, Request


def group_of(method: Method, slots: int, seq: int, blocks: int, mask_id: int) -> SequenceGroup | SpeculativeGroup:
    """An empty group of sequences for a method; the arguments are those of `SequenceGroup`."""
    if isinstance(method.schedule, SelfSpeculation):
        return SpeculativeGroup(method, method.schedule, slots, mask_id)
    return SequenceGroup(method, slots, seq, blocks, mask_id)


@dataclass
class _Text:
    """A text that is being written."""

    stream: int
    tokens: list[int]
    """The known ones."""
    given: int
    """How many of them were the prompt's."""
    length: int
    """Tokens of the finished text."""
    kept: int = 0
    """Positions whose causal keys are kept; all known ones but the last, once the prompt was run."""
    draft: list[int | None] = field(default_factory=list)
    """Guesses of what follows; None = a mask."""
    draft_passes: int = 0
    """Passes that fill its masks yet."""
    passes: int = 0
    positions_run: int = 0
    rows_read: int = 0

    @property
    def known(self) -> int:
        """Known tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class _Part:
    """What a text runs in a pass: the positions [low, low + len(tokens)), the last `drafted` of them masks and guesses
    that see each other."""

    low: int
    tokens: list[int]
    drafted: int
    rows: list[tuple[int, int]]
    """Places among the tokens whose logits are wanted, and the position that each predicts a token for."""
    verified: int = 0
    """Guesses that the pass verifies."""

    def window(self, slot: int) -> Window:
        """Its place in a pass."""
        width = len(self.tokens)
        return Window(slot, self.low, width, self.low + width, drafted=self.drafted)


@dataclass(frozen=True)
class _Guess:
    """What a row of logits says."""

    token: int
    confidence: float


class SpeculativeGroup:
    """Texts that run together in the same passes; stands where other methods have a `SequenceGroup`."""

    def __init__(self, method: Method, settings: SelfSpeculation, slots: int, mask_id: int) -> None:
        """Room for `slots` texts. Raises ValueError: the settings leave the length of a draft to the model."""
        if settings.draft_length is None:
            raise ValueError("the draft has no length yet: `presets.choose` takes it from the model")
        self.method, self.settings = method, settings
        self.passes = 0
        self._mask_id = mask_id
        self._texts: list[_Text | None] = [None] * slots
        self._pending: dict[int, _Part] = {}

    @property
    def free(self) -> list[int]:
        """Slots that hold no unfinished text."""
        return [slot for slot, text in enumerate(self._texts) if text is None]

    def admit(self, slot: int, request: Request) -> None:
        """Begin a text in a free slot.

        Raises:
            ValueError: it is no continuation of at least one token, which a causal pass can begin with.
        """
        length = len(request.tokens) if request.length is None else request.length
        given = next((place for place, gap in enumerate(request.gaps) if gap), length)
        if not 0 < given < length or not all(request.gaps[given:length]):
            raise ValueError("self-speculation continues a text of at least one token, and fills no gap inside of one")
        self._texts[slot] = _Text(request.stream, list(request.tokens[:given]), given, length)

    def plan(self) -> Pass | None:
        """The pass to be run next; None if no text is unfinished."""
        self._pending = {slot: self._part(text) for slot, text in enumerate(self._texts) if text is not None}
        if not self._pending:
            return None
        self.passes += 1
        for slot, part in self._pending.items():
            text = self._text(slot)
            text.passes += 1
            text.positions_run += len(part.tokens)
            text.rows_read += len(part.rows)
        return self._packed()

    def apply(self, statistics: Statistics) -> Step:
        """Apply the statistics `[rows]` of the pass that was planned last: accept, reject and draft tokens."""
        if not self._pending:
            raise RuntimeError("there is no planned pass to apply statistics to")
        rows = zip(statistics.token.tolist(), statistics.confidence.tolist(), strict=True)
        news: dict[int, list[_Guess]] = {}
        for slot, part in self._pending.items():
            found = {place: _Guess(*next(rows)) for place, _ in part.rows}
            news[slot] = self._learn(self._text(slot), part, found)
        step = self._step(news)
        self._pending = {}
        return step

    def _text(self, slot: int) -> _Text:
        text = self._texts[slot]
        assert text is not None
        return text

    def _part(self, text: _Text) -> _Part:
        """What a text runs next."""
        cache = self.method.cache
        low = text.kept if cache.keeps else 0
        if isinstance(cache, BlockCausalCache) and text.known - low > cache.prefill:
            return _Part(low, text.tokens[low : low + cache.prefill], 0, [])
        if not text.draft:
            text.draft = [None] * min(self._draft_length, text.length - text.known)
            text.draft_passes = self.settings.draft_passes
        before, last = text.tokens[low:], text.known - 1 - low
        guesses = [self._mask_id if token is None else token for token in text.draft]
        if None in text.draft:
            open_ones = [place for place, token in enumerate(text.draft) if token is None and place]
            rows = [(last, text.known), *((last + 1 + place, text.known + place) for place in open_ones)]
            return _Part(low, before + guesses, len(guesses), rows)
        return self._verifying(text, low, before + guesses, last)

    def _verifying(self, text: _Text, low: int, tokens: list[int], last: int) -> _Part:
        """A causal pass over `tokens` from `low` on, the guesses behind place `last` among them, and a draft of what
        follows."""
        count, end = len(text.draft), low + len(tokens)
        rows = [(place, low + place + 1) for place in range(last, len(tokens)) if low + place + 1 < text.length]
        ahead = min(self._draft_length, text.length - end) if self.settings.ahead and count else 0
        rows += [(len(tokens) + place, end + place) for place in range(1, ahead)]
        return _Part(low, tokens + [self._mask_id] * ahead, ahead, rows, count)

    @property
    def _draft_length(self) -> int:
        return self.settings.draft_length or 0

    def _packed(self) -> Pass:
        parts = self._pending
        starts = torch.tensor([0, *(len(part.tokens) for part in parts.values())]).cumsum(0)[:-1].tolist()
        places = [start + place for start, part in zip(starts, parts.values(), strict=True) for place, _ in part.rows]
        tokens = torch.tensor([token for part in parts.values() for token in part.tokens])
        output_mask = torch.zeros(len(tokens), dtype=torch.bool)
        output_mask[places] = True
        slots, positions = ([*x] for x in zip(*self._predicted(), strict=True)) if places else ([], [])
        stream = [self._text(slot).stream for slot in slots]
        slot, position, streams = (torch.tensor(x, dtype=torch.int64) for x in (slots, positions, stream))
        rows = LogitRows(slot, position, streams, torch.zeros_like(slot), tokens[places])
        windows = [part.window(slot) for slot, part in parts.items()]
        return Pass(tokens, windows, output_mask, rows, torch.arange(len(places)))

    def _predicted(self) -> list[tuple[int, int]]:
        """Slot and predicted position of each row. With the stream these name its random draws, which are therefore
        the same for a guess and for what verifies it."""
        return [(slot, position) for slot, part in self._pending.items() for _, position in part.rows]

    def _learn(self, text: _Text, part: _Part, found: dict[int, _Guess]) -> list[_Guess]:
        """Bring a text up to date with what a pass found, by place among its tokens; returns the new known tokens."""
        if not part.rows:
            text.kept = part.low + len(part.tokens)
            return []
        last = text.known - 1 - part.low
        news = [found[last]]
        if part.drafted and not part.verified:
            self._fill(text, {place - last - 1: guess for place, guess in found.items() if place > last})
            text.draft = text.draft[1:]
        else:
            while len(news) <= part.verified and news[-1].token == text.draft[len(news) - 1]:
                following = found.get(last + len(news))
                if following is None:  # the text ends with this guess
                    break
                news.append(following)
            accepted = len(news) > part.verified
            ahead = range(last + part.verified + 2, len(part.tokens)) if accepted else range(0)
            text.draft = [found[place].token for place in ahead]
        text.kept = text.known + len(news) - 1
        stops = [place for place, guess in enumerate(news) if guess.token == self.method.stop_id]
        news = news[: stops[0] + 1] if stops else news
        text.tokens += [guess.token for guess in news]
        return news

    def _fill(self, text: _Text, guesses: dict[int, _Guess]) -> None:
        """Commit a pass's share of a draft's masks: the most confident ones, all in its last pass."""
        count = -(-len(guesses) // text.draft_passes)
        for place in sorted(guesses, key=lambda place: -guesses[place].confidence)[:count]:
            text.draft[place] = guesses[place].token
        text.draft_passes -= 1

    def _step(self, news: dict[int, list[_Guess]]) -> Step:
        """What the pass changed, in the form that every method gives it in; finished texts leave their slots."""
        texts = {slot: self._text(slot) for slot in news}
        shape = len(news), max(1, *(len(new) for new in news.values()))
        tokens, confidence = torch.full(shape, self._mask_id), torch.zeros(shape)
        changed = torch.zeros(shape, dtype=torch.bool)
        for row, new in enumerate(news.values()):
            tokens[row, : len(new)] = torch.tensor([guess.token for guess in new], dtype=torch.int64)
            confidence[row, : len(new)] = torch.tensor([guess.confidence for guess in new])
            changed[row, : len(new)] = True
        known = torch.tensor([text.known for text in texts.values()])
        first = known - changed.sum(1)
        block = _block(texts, first, torch.full(shape, self._mask_id), changed)
        finished = [self._finished(slot, text) for slot, text in texts.items() if self._ends(text)]
        revision = Revision(tokens, ~changed, torch.tensor([self._ends(text) for text in texts.values()]))
        return Step(block, Statistics(tokens, confidence), revision, changed, finished)

    def _ends(self, text: _Text) -> bool:
        stopped = text.known > text.given and text.tokens[-1] == self.method.stop_id
        return stopped or text.known >= text.length

    def _finished(self, slot: int, text: _Text) -> Finished:
        """A finished text, filled up with the stop token; its slot is free."""
        self._texts[slot] = None
        tokens = text.tokens + text.tokens[-1:] * (text.length - text.known)
        given = [place < text.given for place in range(text.length)]
        return Finished(text.stream, tokens, given, text.passes, text.positions_run, text.rows_read)


def _block(texts: dict[int, _Text], first: Tensor, tokens: Tensor, changed: Tensor) -> ActiveBlock:
    """The positions that a pass made known, as a block: one row per text."""
    rows = list(texts.values())
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    return ActiveBlock(
        slot=torch.tensor(list(texts)),
        stream=torch.tensor([text.stream for text in rows]),
        first=first,
        start=first,
        end=first + changed.sum(1),
        length=torch.tensor([text.length for text in rows]),
        tokens=tokens,
        masked=changed,
        editable=torch.zeros_like(changed),
        step=torch.tensor([text.passes - 1 for text in rows]),
        step_in_block=zeros,
        index=zeros,
        block_count=zeros + 1,
        masks=changed.sum(1),
    )
