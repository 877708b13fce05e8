"""Times of contenders that take turns, and a table of what they did."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llada_megatron.console import message
from llada_megatron.tools.bench.sampling.contenders import Contender
from llada_megatron.tools.bench.sampling.language import Language, Score
from llada_megatron.tools.bench.sampling.peers import Generated


@dataclass(frozen=True)
class Figures:
    """What a contender did with all prompts."""

    contender: Contender
    seconds: float
    """CPU seconds of a sequence."""
    answers: list[Generated]
    scores: list[Score]

    @cached_property
    def forwards(self) -> float:
        """Forward passes that a sequence took part in."""
        return self._mean([answer.work.forwards for answer in self.answers])

    @cached_property
    def forwards_per_token(self) -> float:
        """Forward passes over tokens before the end of text; infinite where there are none."""
        tokens = self._mean([score.tokens for score in self.scores])
        return self.forwards / tokens if tokens else math.inf

    @cached_property
    def positions(self) -> float:
        """Positions that ran through the layers for a sequence."""
        return self._mean([answer.work.positions for answer in self.answers])

    @cached_property
    def logit_rows(self) -> float:
        """Rows of logits that were computed for a sequence."""
        return self._mean([answer.work.logit_rows for answer in self.answers])

    @cached_property
    def right(self) -> float:
        """Share of the sentences that are right."""
        return self._mean([score.right for score in self.scores])

    @cached_property
    def ends(self) -> float:
        """Share of the texts that end where they should."""
        return self._mean([score.ends for score in self.scores])

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)


def measure(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], language: Language, rounds: int, together: int
) -> dict[str, Figures]:
    """Let every contender answer every prompt in every round.

    They take turns after every few prompts, each of them beginning in its turn, so that none has a quiet hour to
    itself; of the CPU seconds of the same prompts in several rounds the least count: a machine is never too fast.

    Args:
        contenders: who takes part.
        prompts: what is to be continued.
        language: of the prompts; it judges the answers.
        rounds: over all prompts.
        together: prompts of a turn.
    """
    turns = range(0, len(prompts), together)
    least: dict[tuple[str, int], float] = {}
    answers: dict[tuple[str, int], list[Generated]] = {}
    for number in range(rounds):
        for turn, first in enumerate(turns):
            at = (number * len(turns) + turn) % len(contenders)
            for contender in [*contenders[at:], *contenders[:at]]:
                key = contender.name, first
                start = time.process_time()
                answers[key] = contender.write(prompts[first : first + together])
                least[key] = min(least.get(key, float("inf")), time.process_time() - start)
            message(f"round {number + 1}/{rounds}: {min(first + together, len(prompts))}/{len(prompts)} prompts")
    return {
        contender.name: _figures(
            contender,
            sum(least[contender.name, first] for first in turns) / len(prompts),
            [answer for first in turns for answer in answers[contender.name, first]],
            prompts,
            language,
        )
        for contender in contenders
    }


def _figures(
    contender: Contender, seconds: float, answers: list[Generated], prompts: Sequence[list[int]], language: Language
) -> Figures:
    scores = [language.score(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    return Figures(contender, seconds, answers, scores)


def same_tokens(ours: Figures, theirs: Figures, end: int | None = None) -> float:
    """Share of the sequences with the same tokens; with `end` only those up to the first such token count."""

    def text(answer: Generated) -> list[int]:
        known = end is not None and end in answer.tokens
        return answer.tokens[: answer.tokens.index(end) + 1] if known else answer.tokens

    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    return sum(text(one) == text(other) for one, other in pairs) / len(pairs)


_HEADINGS = (
    "sampler", "CPU s", "times as fast", "forwards", "forwards / token", "positions run", "logit rows", "right", "ends",
)  # fmt: skip


def table(figures: Sequence[Figures], reference: Figures) -> str:
    """One line for each, the fastest first: all but the shares and the ratio are of a sequence. Valid Markdown."""
    rows = [_HEADINGS, tuple("---:" if at else "---" for at in range(len(_HEADINGS)))]
    rows += [_row(each, reference) for each in sorted(figures, key=lambda each: each.seconds)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in range(1, len(row)))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(each: Figures, reference: Figures) -> tuple[str, ...]:
    return (
        each.contender.name,
        f"{each.seconds:.3f}",
        f"{reference.seconds / each.seconds:.1f}",
        f"{each.forwards:.1f}",
        f"{each.forwards_per_token:.3f}",
        f"{each.positions:,.0f}",
        f"{each.logit_rows:,.0f}",
        f"{each.right:.3f}",
        f"{each.ends:.2f}",
    )
