"""`llada bench words`: whether the laptop's fine-tuned model answers new questions in the format that it has learnt."""

from __future__ import annotations

import argparse

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_least, reported
from llada_megatron.tools.bench.word_questions import add_model_arguments, ask, protocol, questions_of

GOAL = 95.0
"""Percent of the answers."""
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how many questions."""
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> list[Claim]:
    """The share of the answers that are in the format, and of those that are right.

    Raises:
        LladaError: there is no such model, or it cannot be asked.
    """
    questions = questions_of(args)
    (found,) = ask(args.model, questions, [{"name": "threshold"}])
    message(f"protocol: {protocol(found.questions, 'schedule threshold 0.9')}")
    for text in found.wrong_format[:_SHOWN]:
        message(f"not in the format: {text!r}")
    share = 100 / found.questions
    return [
        at_least("answers in the format that was learnt", share * found.in_format, "%", GOAL),
        reported("answers that are right, too", share * found.right, "%"),
        reported("tokens of an answer per forward pass", found.tokens_per_forward, ""),
    ]
