"""Short conversations that are made up: tasks about words, with answers in a fixed format, for a first fine-tuning."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COUNT = 6000
"""Conversations."""

_VOWELS, _CONSONANTS = "aeiou", "bcdfghklmnprstvz"
_FORMAT = re.compile(r"Answer: [A-Za-z0-9]+\.")


@dataclass(frozen=True)
class Question:
    """A task about a word, and what answers it."""

    word: str
    text: str
    answer: str
    """In the format of all answers."""


def generated_chats(count: int = COUNT, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The messages of each conversation, of one or two questions; the same every time."""
    for questions in _conversations(count, seed):
        yield [
            message
            for question in questions
            for message in (
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answer},
            )
        ]


def new_questions(count: int, seed: int = 1) -> list[Question]:
    """Questions about words that no conversation of `generated_chats` speaks of; the same every time."""
    known = {question.word for questions in _conversations(COUNT, 0) for question in questions}
    draw, found = random.Random(seed), list[Question]()
    while len(found) < count:
        question = _question(draw)
        if question.word not in known:
            found.append(question)
    return found


def in_format(answer: str) -> bool:
    """Whether a text is written as every answer is: "Answer: ", one word, and a full stop."""
    return _FORMAT.fullmatch(answer) is not None


def _conversations(count: int, seed: int) -> Iterator[list[Question]]:
    draw = random.Random(seed)
    for _ in range(count):
        yield [_question(draw) for _ in range(draw.choice((1, 1, 2)))]


def _question(draw: random.Random) -> Question:
    word, (text, answer) = _word(draw), draw.choice(TASKS)
    return Question(word, text.format(word), f"Answer: {answer(word)}.")


def _word(draw: random.Random) -> str:
    """A word that can be said: two or three syllables."""
    syllables = range(draw.choice((2, 2, 3)))
    return "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in syllables)


TASKS: list[tuple[str, Callable[[str], str]]] = [
    ("Repeat the word {}.", lambda word: word),
    ("Write {} in capitals.", str.upper),
    ("What is the first letter of {}?", lambda word: word[0]),
    ("What is the last letter of {}?", lambda word: word[-1]),
    ("How many letters has {}?", lambda word: str(len(word))),
]
"""Questions about a word, and what answers them."""
