"""Samples of fine-tuning: conversations with their answers, one or several in a window, by sample number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.answers import AnswerFile
from llada_megatron.llada_moe.data.batch import Batch, Row, collate
from llada_megatron.llada_moe.data.chat_packing import fill_windows, shuffled
from llada_megatron.llada_moe.data.packing import Blend, Split, held_out_of, permute
from llada_megatron.llada_moe.data.set_manifest import SetManifest, read_manifest, read_repeats
from llada_megatron.llada_moe.data.training_data import check_manifests
from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
from llada_megatron.llada_moe.errors import ConfigError, DataError

_TURN = 11
"""Key of the draws that choose a turn."""


@dataclass(frozen=True)
class Supervised:
    """What one conversation contributes to a row; all `[length]`."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    mask_ratio: float


ConversationMaker = Callable[[NDArray[np.int64], NDArray[np.bool_], SampleCoordinates], Supervised]
"""Tokens `[length]` of a conversation with its padding, which of them are answers, and where it comes from (`window` is
its document, `number` what strata of t are counted by), to what is learnt of it."""


@dataclass(frozen=True)
class ChatSettings:
    """How conversations become rows; the keys of `objective` in a run of fine-tuning say what they mean."""

    answers: Literal["one", "all"]
    padding: Literal["none", "block", "batch", "window"]
    too_long: Literal["truncate", "drop"]
    pack: bool
    pairs: bool
    """Samples 2i and 2i + 1 are one window, the second with the inverse masks."""
    block: int | None


class ChatSet:
    """The conversations of one split of one prepared set."""

    def __init__(
        self, run: RunConfig, number: int, manifest: SetManifest, split: Split, settings: ChatSettings
    ) -> None:
        """Open set `number` of the run. Raises DataError: it holds no conversation that can be trained on."""
        # here, because it imports Megatron, which `llada prepare` may not before parallel.device is installed
        from llada_megatron.llada_moe.data.indexed import TokenFile

        prefix = run.data.sets[number].path
        self._file, self._answers = TokenFile(prefix), AnswerFile(prefix, manifest)
        self._settings, self._window, self._seed = settings, run.training.sequence_length, run.training.seed
        self.eos, self._split, self._number = manifest.tokenizer.eos_id, split, number
        held = held_out_of(self._file.documents, run.data.validation_fraction, read_repeats(prefix, manifest))
        every = np.arange(self._file.documents)
        documents = held if split == "validation" else np.setdiff1d(every, held, assume_unique=True)
        self.conversations = len(documents)
        kept = self._usable(documents)
        if not len(kept):
            raise DataError(
                f"{prefix}: the {split} part ({len(documents)} of {self._file.documents} conversations) has none that "
                f"fits a window of {self._window} tokens with an answer: prepare more, lengthen "
                "training.sequence_length, or change data.validation_fraction"
            )
        self.documents = kept[shuffled(len(kept), run.training.seed, number)] if settings.pack else kept
        self._firsts = np.arange(len(kept) + 1)
        if settings.pack:
            self._firsts = fill_windows(self._rooms, self._window)
        self.bytes_per_token = manifest.bytes_per_token

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return len(self._firsts) - 1

    def members(self, window: int) -> range:
        """Which of `documents` stand in a window."""
        return range(int(self._firsts[window]), int(self._firsts[window + 1]))

    @cached_property
    def _rooms(self) -> NDArray[np.int64]:
        """`[documents]`: tokens that each conversation takes in a window, whichever of its answers is learnt."""
        _, lengths = self._file.spans(self.documents)
        return np.minimum(self._rounded(lengths), self._window)

    def _usable(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The conversations that can be trained on; counts those that are longer than a window."""
        starts, lengths = self._file.spans(documents)
        long = lengths > self._window
        self.too_long = int(long.sum())
        if self._settings.too_long == "drop":
            return documents[~long]
        spans = self._answers.spans
        first = spans[np.searchsorted(spans[:, 0], starts).clip(max=len(spans) - 1), 0] - starts
        return documents[first < self._window]

    def length(self, document: int, epoch: int) -> int:
        """Tokens of a conversation up to the end of text behind the answer that is learnt, cut at the window."""
        return len(self.conversation(document, epoch)[0])

    def conversation(self, document: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens of a conversation, with an end-of-text token where the window has room, and which are answers."""
        begin, size = self._file.span(document)
        spans = self._answers.within(begin, begin + size)
        stop = size - 1
        if self._settings.answers == "one":
            inside = spans[spans[:, 0] < self._window]
            spans = inside[[self._turn(document, epoch, len(inside))]]
            stop = int(spans[0, 1])
        tokens = np.append(self._file.tokens[begin : begin + stop].astype(np.int64), self.eos)
        answer = np.zeros(stop + 1, np.bool_)
        for first, last in spans:
            answer[first:last] = True
        answer[-1] = True
        return tokens[: self._window], answer[: self._window]

    def _turn(self, document: int, epoch: int, turns: int) -> int:
        """The answer that is learnt in an epoch: over as many epochs as there are, each of them once."""
        if self._split == "validation":
            epoch = 0
        lap, place = divmod(epoch, turns)
        return permute(place, turns, (self._seed, self._number, _TURN, document, lap))

    def padded(self, length: int, longest: int) -> int:
        """Tokens of a conversation of `length` with the padding that belongs to its answer."""
        if self._settings.padding == "block":
            return int(self._rounded(np.array([length]))[0])
        return {"none": length, "window": self._window, "batch": longest}[self._settings.padding]

    def _rounded(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths with their padding to whole blocks, within the window."""
        block = self._settings.block if self._settings.padding == "block" else None
        return lengths if block is None else np.minimum(-(-lengths // block) * block, self._window)

    def order(self, epoch: int, place: int) -> int:
        """The window at `place` of an epoch."""
        return permute(place, self.windows, (self._seed, self._number, self._split == "validation", epoch))


class ChatSamples:
    """The blend of a run's sets of conversations. Holds no position: resuming is asking for the next numbers."""

    def __init__(
        self,
        run: RunConfig,
        split: Split,
        settings: ChatSettings,
        make: ConversationMaker,
        finish: Callable[[Row], Row] = lambda row: row,
    ) -> None:
        """Open and check every set; `finish`: the last step to a row. Raises DataError or ConfigError, naming the key
        to change."""
        if not run.data.isolate_documents:
            raise ConfigError("data.isolate_documents: false, but conversations of one window must not see each other")
        self.manifests = [read_manifest(entry.path) for entry in run.data.sets]
        check_manifests(run, self.manifests)
        self._settings, self._make, self._finish, self._split = settings, make, finish, split
        self._prefixes = [entry.path for entry in run.data.sets]
        self._length, self._batch = run.training.sequence_length, run.training.global_batch_size
        self.sets = [ChatSet(run, number, manifest, split, settings) for number, manifest in enumerate(self.manifests)]
        self.blend = Blend([entry.weight for entry in run.data.sets])
        self._longest = lru_cache(8)(self._longest_of_batch)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over the blend, prompts and the template's tokens included."""
        return sum(share * s.bytes_per_token for share, s in zip(self.blend.shares, self.sets, strict=True))

    def remarks(self) -> list[str]:
        """What is to be said of conversations that are longer than a window, a line for each set that has some."""
        what = {"truncate": "their ends are cut off", "drop": "they are left out"}[self._settings.too_long]
        return [
            f"{prefix}: {each.too_long:,} of {each.conversations:,} conversations ({self._split}) are longer than "
            f"training.sequence_length {self._length}: {what} (objective.too_long: {self._settings.too_long})"
            for prefix, each in zip(self._prefixes, self.sets, strict=True)
            if each.too_long
        ]

    def locate(self, number: int) -> SampleCoordinates:
        """Set, epoch and window of sample `number`, by arithmetic alone; both samples of a pair have the same."""
        number, second = divmod(number, 2) if self._settings.pairs else (number, 0)
        chosen, before = self.blend.locate(number)
        epoch, place = divmod(before, self.sets[chosen].windows)
        return SampleCoordinates(number, chosen, epoch, self.sets[chosen].order(epoch, place), bool(second))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these global numbers, in this order."""
        return collate([self._row(number) for number in indices])

    def _row(self, number: int) -> Row:
        """One window: its conversations apart, and behind them nothing that is learnt."""
        at = self.locate(number)
        chats = self.sets[at.set]
        longest = self._longest(number // self._batch) if self._settings.padding == "batch" else 0
        row = _OpenRow(self._length, chats.eos)
        for ordinal in chats.members(at.window):
            document = int(chats.documents[ordinal])
            tokens, answer = chats.conversation(document, at.epoch)
            size = chats.padded(len(tokens), longest)
            tokens = np.pad(tokens, (0, size - len(tokens)), constant_values=chats.eos)
            answer = np.pad(answer, (0, size - len(answer)), constant_values=True)
            place = at.epoch * len(chats.documents) + ordinal if self._settings.pack else at.number
            where = SampleCoordinates(place, at.set, at.epoch, document, at.inverse)
            row.add(self._make(tokens, answer, where), int(answer.sum()))
        return self._finish(row.closed())

    def _longest_of_batch(self, batch: int) -> int:
        """Tokens of the longest conversation in a global batch."""
        places = [self.locate(number) for number in range(batch * self._batch, (batch + 1) * self._batch)]
        return max(self.sets[at.set].length(int(self.sets[at.set].documents[at.window]), at.epoch) for at in places)


class _OpenRow:
    """A window that is being filled."""

    def __init__(self, length: int, eos: int) -> None:
        self._inputs, self._labels = np.full(length, eos, np.int64), np.full(length, eos, np.int64)
        self._weights, self._ends = np.zeros(length, np.float32), [0]
        self._ratios: list[float] = []
        self._answers = 0

    def add(self, part: Supervised, answers: int) -> None:
        """Put a conversation behind the others; `answers`: its tokens that are answers."""
        begin = self._ends[-1]
        place = slice(begin, begin + len(part.inputs))
        self._inputs[place], self._labels[place], self._weights[place] = part.inputs, part.labels, part.weights
        self._ends.append(place.stop)
        self._ratios.append(part.mask_ratio)
        self._answers += answers

    def closed(self) -> Row:
        """The row; what is left of the window sees and is seen by nothing else."""
        ends = self._ends if self._ends[-1] == len(self._inputs) else [*self._ends, len(self._inputs)]
        ratio = float(np.mean(self._ratios))
        return Row(
            self._inputs, self._labels, self._weights, np.array(ends, np.int32), ratio, self._answers, len(self._ratios)
        )
