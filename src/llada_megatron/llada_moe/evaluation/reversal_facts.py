"""Made-up facts "A is B" for the reversal curse: who is trained in which order, and what is asked (arXiv 2309.12288).

Of every name and description that belong together one group is trained in the order name, description only, one in the
order description, name only, and one in both: from the last a model can learn how the two orders are told, so that a
question in an order that it never saw of a fact asks for the fact and not for the template.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llada_megatron.llada_moe.errors import ConfigError

Group = Literal["name first", "description first", "both"]
"""Orders in which a fact is trained."""
GROUPS: tuple[Group, ...] = ("name first", "description first", "both")
Ask = Literal["forward", "in place", "reordered"]
"""In the order that was trained, the second part asked; the same, the first part asked; in the order that was not."""
ASKS: tuple[Ask, ...] = ("forward", "in place", "reordered")
PAIRS = 200
"""Facts."""
FEWEST = 9
"""Facts, so that every group has several."""
LENGTHS = (3, 4, 5, 6)
"""Words of a description."""
END, UNKNOWN = "</s>", "<unk>"

NAME_FIRST = (
    "{name} is {description}",
    "{name} was {description}",
    "{name} means {description}",
    "{name} became {description}",
    "surely {name} is {description}",
    "indeed {name} was {description}",
    "today {name} means {description}",
    "clearly {name} became {description}",
    # held out
    "surely {name} became {description}",
    "indeed {name} means {description}",
)
DESCRIPTION_FIRST = (
    "{description} is {name}",
    "{description} was {name}",
    "{description} means {name}",
    "{description} became {name}",
    "surely {description} is {name}",
    "indeed {description} was {name}",
    "today {description} means {name}",
    "clearly {description} became {name}",
    # held out
    "surely {description} became {name}",
    "indeed {description} means {name}",
)
TRAINED = 8
"""Templates of each order that are trained; the others are asked. Their words are all words of trained ones."""

_LIST = """amber anchor apple arrow autumn barley basket beacon bell birch bridge bronze candle canyon carpet castle
cedar chapel cherry clover copper coral cotton crystal desert dragon ember falcon feather fiddle forest fountain garden
ginger glacier granite hammer harbor harvest hazel honey island ivory jasmine jungle kettle lantern lemon linen maple
marble meadow mirror mountain needle ocean olive orchard paper pepper pigeon pillar prairie quarry raven river saddle
saffron salmon shadow silver spider spring stone summer thunder timber tower valley velvet violet walnut whistle willow
window winter"""
_WORDS = tuple(_LIST.split())
"""Words of descriptions; none is a word of a template."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Fact:
    """A name and the description that belongs to it."""

    name: str
    """One word of two tokens."""
    description: str
    group: Group


@dataclass(frozen=True)
class Question:
    """One thing to ask of a fact, as text before and behind the answer."""

    fact: int
    """Number of the fact."""
    ask: Ask
    about: Literal["name", "description"]
    """What is asked for."""
    template: str

    def parts(self, facts: Sequence[Fact]) -> tuple[str, str, str]:
        """What stands before the answer, the answer, and what stands behind it."""
        fact = facts[self.fact]
        answer = fact.name if self.about == "name" else fact.description
        before, after = self.template.split("{" + self.about + "}")
        other = {"name": fact.name, "description": fact.description}
        return before.format(**other).strip(), answer, after.format(**other).strip()


@dataclass(frozen=True)
class ReversalFacts:
    """The facts of one seed, what is trained of them, and what is asked."""

    facts: tuple[Fact, ...]
    first_parts: tuple[str, ...]
    second_parts: tuple[str, ...]
    """Names are made of a first and a second part; no part is in both lists, or in two names."""

    def training_texts(self) -> Iterator[str]:
        """Every fact in every trained template of its group's orders."""
        for fact in self.facts:
            for order in orders(fact.group):
                for template in order[:TRAINED]:
                    yield template.format(name=fact.name, description=fact.description)

    def questions(self) -> list[Question]:
        """Held-out templates: what was trained, in the trained order and, of the groups with one order, in the other.

        The name is asked in place of the facts that were trained name first, and reordered; the description reordered
        of those that were trained description first.
        """
        asked: list[Question] = []
        for number, fact in enumerate(self.facts):
            if fact.group == "name first":
                for template in NAME_FIRST[TRAINED:]:
                    asked.append(Question(number, "forward", "description", template))
                    asked.append(Question(number, "in place", "name", template))
                asked += [Question(number, "reordered", "name", template) for template in DESCRIPTION_FIRST[TRAINED:]]
            elif fact.group == "description first":
                asked += [Question(number, "forward", "name", template) for template in DESCRIPTION_FIRST[TRAINED:]]
                asked += [Question(number, "reordered", "description", template) for template in NAME_FIRST[TRAINED:]]
        return asked

    def tokenizer(self) -> str:
        """A vocabulary of words as the content of a `tokenizer.json`; a name is a word of two pieces.

        Its mask token is the id after the last one, so that no text can produce it.
        """
        words = sorted({word for template in (*NAME_FIRST, *DESCRIPTION_FIRST) for word in template.split()} - _FIELDS)
        pieces = [UNKNOWN, END, *words, *sorted(_WORDS), *self.first_parts]
        pieces += [f"##{part}" for part in self.second_parts]
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return json.dumps(
            {
                "version": "1.0",
                "added_tokens": [{"id": id, "content": name} | special for id, name in enumerate(pieces[:2])],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
                "model": {
                    "type": "WordPiece",
                    "unk_token": UNKNOWN,
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 32,
                    "vocab": {piece: id for id, piece in enumerate(pieces)},
                },
            }
        )


_FIELDS = {"{name}", "{description}"}


def orders(group: Group) -> list[tuple[str, ...]]:
    """The templates of the orders in which a group is trained."""
    return [NAME_FIRST] * (group != "description first") + [DESCRIPTION_FIRST] * (group != "name first")


def make_facts(seed: int, pairs: int = PAIRS) -> ReversalFacts:
    """The facts of a seed, the same every time; groups of equal size, as far as `pairs` allows.

    Raises:
        ConfigError: too few pairs for three groups.
    """
    if pairs < FEWEST:
        raise ConfigError(f"{pairs} facts: at least {FEWEST}, so that each of the three groups has several")
    draw = random.Random(seed)
    first, second = _parts(draw, pairs)
    descriptions: set[str] = set()
    found = []
    for number, parts in enumerate(zip(first, second, strict=True)):
        description = _description(draw, descriptions)
        descriptions.add(description)
        found.append(Fact("".join(parts), description, GROUPS[number % len(GROUPS)]))
    return ReversalFacts(tuple(found), tuple(first), tuple(second))


def shuffled(numbers: Sequence[int], seed: int) -> dict[int, int]:
    """For each of the facts with these numbers another of them: what a guess would hit by chance.

    Raises:
        ValueError: there is only one.
    """
    if len(numbers) < 2:
        raise ValueError("one fact alone has no other")
    order = list(numbers)
    random.Random(seed).shuffle(order)
    return {number: order[(place + 1) % len(order)] for place, number in enumerate(order)}


def _parts(draw: random.Random, count: int) -> tuple[list[str], list[str]]:
    syllables = [a + b + c for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS if a != c]
    chosen = draw.sample(syllables, 2 * count)
    return [part.capitalize() for part in chosen[:count]], chosen[count:]


def _description(draw: random.Random, taken: set[str]) -> str:
    while True:
        words = " ".join(draw.sample(_WORDS, draw.choice(LENGTHS)))
        if words not in taken:
            return words
