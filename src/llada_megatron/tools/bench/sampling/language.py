"""A small language in which right and wrong can be counted, so that samplers are compared on quality as well as speed.

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
from dataclasses import dataclass
from functools import cached_property

SURE, OPEN = (0.97, 0.01, 0.01, 0.01), (0.4, 0.3, 0.2, 0.1)
"""Probabilities of the four successors of a head."""
_HELD_OUT = 10**9
"""Seeds from here on belong to no training (see `lessons`)."""


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
        """Tokens."""
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
    def words(self) -> range:
        """Ids that sentences are made of."""
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
