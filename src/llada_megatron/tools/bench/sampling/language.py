"""A small language in which right and wrong can be counted, and batches of examples that train a model on it.

With it samplers are compared on quality as well as speed.

A sentence is a head, a tail that the head alone decides, and a number that counts down to 0. The next head is drawn
from four successors of the head before it: nearly certain after one half of the heads, open after the other. Tails
share few tokens, so that the most probable token of each position, taken alone, need not make a tail that exists:
committing several positions of an unknown sentence at once can go wrong, as it can in a natural language.

    prompt    BOS, a title of any length, sentences ..., n
    response  n sentences ..., 0, end of text ...
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Row, collate
from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
from llada_megatron.llada_moe.objectives import make_objective

if TYPE_CHECKING:
    from llada_megatron.llada_moe.objectives.interface import RowMaker

SURE, OPEN = (0.97, 0.01, 0.01, 0.01), (0.4, 0.3, 0.2, 0.1)
"""Probabilities of the four successors of a head."""

_HELD_OUT, _SEED_STRIDE = 10**9, 1_000_003
"""Seeds from the first on belong to no training batch; how far apart the seeds of two trainings are."""


@dataclass(frozen=True)
class Example:
    """One text of the language, as token ids."""

    prompt: list[int]
    response: list[int]
    """All its sentences and an end of text."""


@dataclass(frozen=True)
class Score:
    """How good a response is."""

    right: float
    """Share of the sentences asked for that are right: a possible successor, its tail, the next number."""
    ends: bool
    """The text ends after the last sentence asked for, and there only."""
    tokens: int
    """Tokens before the first end of text."""


@dataclass(frozen=True)
class Language:
    """Sizes of the language; everything else follows from them and the seed.

    The vocabulary is far larger than the language needs: the output layer is to weigh what it does in LLaDA-MoE.
    """

    heads: int = 24
    tail_length: int = 6
    tail_choices: int = 5
    """Tokens that a position of a tail is drawn from."""
    title_words: int = 1000
    longest_title: int = 7
    prompt_sentences: tuple[int, int] = (4, 7)
    """Fewest and most sentences of a prompt."""
    response_sentences: tuple[int, int] = (8, 15)
    vocab_size: int = 8192
    seed: int = 7

    @property
    def mask_id(self) -> int:
        """The mask token."""
        return self.vocab_size - 1

    @property
    def eos_id(self) -> int:
        """End of text."""
        return self.vocab_size - 2

    @property
    def bos_id(self) -> int:
        """Beginning of text."""
        return self.vocab_size - 3

    @property
    def sentence_length(self) -> int:
        """Tokens of a sentence."""
        return self.tail_length + 2

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that there is."""
        return 1 + self.longest_title + self.prompt_sentences[1] * self.sentence_length

    @property
    def _tail_start(self) -> int:
        return self.heads

    @property
    def _number_start(self) -> int:
        return self._tail_start + self.tail_length * self.tail_choices

    @property
    def _title_start(self) -> int:
        return self._number_start + self.prompt_sentences[1] + self.response_sentences[1]

    @property
    def sentence_tokens(self) -> range:
        """Token ids that sentences are made of."""
        return range(self._title_start)

    def number(self, value: int) -> int:
        """The token of a number."""
        return self._number_start + value

    @cached_property
    def tails(self) -> list[list[int]]:
        """The tail of each head; no two are equal."""
        draw, tails = random.Random(self.seed), []
        while len(tails) < self.heads:
            choice = [draw.randrange(self.tail_choices) for _ in range(self.tail_length)]
            tail = [self._tail_start + slot * self.tail_choices + value for slot, value in enumerate(choice)]
            if tail not in tails:
                tails.append(tail)
        return tails

    @cached_property
    def successors(self) -> list[list[int]]:
        """Four different successors of each head."""
        draw = random.Random(self.seed + 1)
        return [draw.sample(range(self.heads), 4) for _ in range(self.heads)]

    def example(self, seed: int) -> Example:
        """The text that a seed stands for."""
        draw = random.Random(seed)
        before, after = draw.randint(*self.prompt_sentences), draw.randint(*self.response_sentences)
        length = draw.randint(0, self.longest_title)
        prompt = [self.bos_id, *(self._title_start + draw.randrange(self.title_words) for _ in range(length))]
        head, response = draw.randrange(self.heads), []
        for number in reversed(range(before + after)):
            weights = SURE if head % 2 else OPEN
            head = draw.choices(self.successors[head], weights)[0]
            part = prompt if number >= after else response
            part += [head, *self.tails[head], self.number(number)]
        return Example(prompt, [*response, self.eos_id])

    def held_out(self, number: int) -> Example:
        """A text that no model was trained on, but by chance."""
        return self.example(_HELD_OUT + number)

    def score(self, prompt: Sequence[int], response: Sequence[int]) -> Score:
        """Judge a response (without its prompt) of any length.

        Raises:
            ValueError: the prompt does not end with a number.
        """
        asked, size = prompt[-1] - self._number_start, self.sentence_length
        if not 0 < asked < self.prompt_sentences[1] + self.response_sentences[1]:
            raise ValueError(f"the prompt ends with token {prompt[-1]}, which is no number")
        response, before, right = list(response), prompt[-size], 0
        for index in range(asked):
            sentence = response[index * size : (index + 1) * size]
            head = sentence[0] if sentence else -1
            known = 0 <= head < self.heads
            expected = [head, *self.tails[head], self.number(asked - 1 - index)] if known else None
            right += sentence == expected and head in self.successors[before]
            before = head if known else before
        text = response.index(self.eos_id) if self.eos_id in response else len(response)
        rest = response[asked * size :]
        ends = text == asked * size and bool(rest) and all(token == self.eos_id for token in rest)
        return Score(right / asked, ends, text)


@dataclass(frozen=True)
class ExampleBatches:
    """Training batches of examples: which batch a step number stands for.

    Prompts stay visible. Of a response, each token is masked with a probability p drawn per sequence from U(epsilon, 1)
    and supervised with the weight 1/p (LLaDA, arXiv 2502.09992, equation 5). In a share of the sequences, some of the
    tokens that stay visible are replaced by other tokens of the language, and all visible ones are supervised with the
    weight 1: the model learns to tell which tokens are wrong and what they should be (the token-to-token training of
    LLaDA2.1).
    """

    language: Language
    sequences: int
    """Of a batch."""
    length: int
    """Positions of each."""
    window: int | None
    """Positions of a response, filled up with end-of-text tokens, that the model sees at once; the rest of the sequence
    is kept apart from it. None = all to the end of the sequence."""
    edited_sequences: float
    """Share of the sequences with wrong tokens; 0 = none."""
    edited_tokens: float
    """Share of the visible response tokens that are wrong in those sequences."""
    seed: int
    epsilon: float = 1e-3

    def batch(self, step: int) -> Batch:
        """The batch of a step, `sequences` rows of `length` positions."""
        draw = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + step)
        labels, response, boundaries = self._texts(step)
        ratio = self.epsilon + (1 - self.epsilon) * torch.rand(self.sequences, 1, generator=draw)
        masked = response & (torch.rand(labels.shape, generator=draw) < ratio)
        inputs = labels.masked_fill(masked, self.language.mask_id)
        weights = masked / ratio
        if self.edited_sequences:
            edited = torch.rand(self.sequences, 1, generator=draw) < self.edited_sequences
            visible = edited & response & ~masked
            wrong = visible & (torch.rand(labels.shape, generator=draw) < self.edited_tokens)
            replacements = torch.randint(len(self.language.sentence_tokens), labels.shape, generator=draw)
            inputs, weights = torch.where(wrong, replacements, inputs), torch.where(visible, 1.0, weights)
        return Batch(
            inputs=inputs,
            labels=labels,
            weights=weights,
            boundaries=boundaries,
            mask_ratio=ratio[:, 0],
            untruncated=torch.full((self.sequences,), self.length),
            answer=response.sum(dim=1),
        )

    def _texts(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens and which of them belong to a response, both `[batch, seq]`, and the attention's boundaries."""
        tokens = torch.full((self.sequences, self.length), self.language.eos_id)
        response = torch.zeros(tokens.shape, dtype=torch.bool)
        offsets = [0]
        for row in range(self.sequences):
            example = self.language.example(self.seed * _SEED_STRIDE + step * self.sequences + row)
            start, text = len(example.prompt), example.prompt + example.response
            stop = self.length if self.window is None else start + self.window
            tokens[row, : len(text)] = torch.tensor(text)
            response[row, start:stop] = True
            offsets += sorted({row * self.length + stop, (row + 1) * self.length})
        return tokens, response, torch.tensor(offsets, dtype=torch.int32)


class Examples(Protocol):
    """Which batch the number of a training step stands for."""

    def batch(self, step: int) -> Batch:
        """The batch of a step."""


@dataclass(frozen=True)
class BlockDiffusionBatches:
    """Training batches of whole texts, filled up with end-of-text tokens, with the noise of a run's block diffusion."""

    language: Language
    run: RunConfig
    seed: int

    def batch(self, step: int) -> Batch:
        """The batch of a step: rows `[x_t ; x_0]`."""
        return collate([self._row(step, place) for place in range(self.run.training.global_batch_size)])

    @cached_property
    def _make(self) -> RowMaker:
        words = len(self.language.sentence_tokens)
        return make_objective(self.run.objective, self.run.training).rows(self.run, "train", words)

    def _row(self, step: int, place: int) -> Row:
        number = step * self.run.training.global_batch_size + place
        example = self.language.example(self.seed * _SEED_STRIDE + number)
        text = np.full(self.run.training.sequence_length, self.language.eos_id, np.int64)
        tokens = example.prompt + example.response
        text[: len(tokens)] = tokens
        return self._make(text, np.array([0, len(text)], np.int32), SampleCoordinates(number, 0, 0, number))


@dataclass(frozen=True)
class JointBatches:
    """The same examples as `[x_t ; x_0]` for a model that drafts and verifies: masked responses, and behind them the
    texts, whose next tokens are learnt where these belong to a response."""

    examples: ExampleBatches
    autoregressive: float
    diffusion: float
    """What the weights of the two halves are multiplied by."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, rows of twice the examples' length."""
        noisy = self.examples.batch(step)
        rows, length = noisy.labels.shape
        learnt = torch.arange(length) >= length - noisy.answer[:, None]  # responses end with their rows
        following = noisy.labels.roll(-1, dims=1)
        weights = learnt.roll(-1, dims=1).float()
        weights[:, -1] = 0.0
        return replace(
            noisy,
            inputs=torch.cat([noisy.inputs, noisy.labels], dim=1),
            labels=torch.cat([noisy.labels, following], dim=1),
            weights=torch.cat([noisy.weights * self.diffusion, weights * self.autoregressive], dim=1),
            boundaries=torch.arange(2 * rows + 1, dtype=torch.int32) * length,
        )
