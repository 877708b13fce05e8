"""Prepared sets of conversations for tests, written without a tokenizer, and conversations as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.answers import AnswerWriter
from llada_megatron.llada_moe.data.indexed import TokenWriter
from llada_megatron.llada_moe.data.set_manifest import (
    ChatFacts,
    SetManifest,
    SourceFacts,
    TokenizerFacts,
    prefix_file,
    to_json,
)
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
from llada_megatron.tools.bench.layouts import MODELS, parity_run

VOCABULARY, EOS, MASK = 16, 14, 15
"""So few words that an untrained model, too, is right here and there."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation: tokens with an end of text, and the spans of its answers."""

    tokens: list[int]
    answers: list[tuple[int, int]]


def random_chats(count: int, seed: int, longest_turn: int = 9) -> list[Chat]:
    """Conversations of one to three answers."""
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        tokens: list[int] = []
        answers = []
        for _ in range(draw.randint(1, 3)):
            tokens += [draw.randrange(EOS) for _ in range(draw.randint(1, longest_turn))]
            answer = [draw.randrange(EOS) for _ in range(draw.randint(1, longest_turn))]
            answers.append((len(tokens), len(tokens) + len(answer)))
            tokens += answer
        chats.append(Chat([*tokens, EOS], answers))
    return chats


def write_chats(prefix: Path, chats: list[Chat]) -> Path:
    """A prepared set of these conversations."""
    writer, answers = TokenWriter(prefix, np.uint16), AnswerWriter(prefix)
    for chat in chats:
        answers.add(chat.answers, writer.tokens)
        writer.add(np.array(chat.tokens), [len(chat.tokens)], [3 * len(chat.tokens)])
    answers.close()
    writer.finish()
    manifest = SetManifest(
        tokenizer=TokenizerFacts(file="t.model", sha256="0" * 64, vocab_size=VOCABULARY, mask_id=MASK, eos_id=EOS),
        documents=len(chats),
        tokens=writer.tokens,
        bytes=3 * writer.tokens,
        dtype="uint16",
        sources=[SourceFacts(input="x", files=1, documents=len(chats), bytes=3 * writer.tokens)],
        chat=ChatFacts(
            answers=answers.answers,
            answer_tokens=answers.tokens,
            longest=max(len(chat.tokens) for chat in chats),
            template="",
        ),
    )
    prefix_file(prefix, ".json").write_text(json.dumps(to_json(manifest)))
    return prefix


def chat_run(
    prefix: Path, length: int = 64, batch: int = 8, layout: LayoutConfig | None = None, kind: str = "sft",
    model: str = "dense", **keys,
) -> RunConfig:  # fmt: skip
    """A small run of fine-tuning on a set; further keyword arguments are keys of the objective."""
    small = {"num_layers": 2, "vocab_size": VOCABULARY, "eos_token_id": EOS, "mask_token_id": MASK}
    run = parity_run(dataclasses.replace(MODELS[model], max_sequence_length=1024, **small), layout or LayoutConfig())
    training = {"sequence_length": length, "global_batch_size": batch, "micro_batch_size": 1}
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, **training),
        data=DataConfig(sets=[DataSetConfig(path=str(prefix))], validation_fraction=keys.pop("held_out", 0.0)),
        objective=FineTuningConfig(kind=kind, **keys),
    )
