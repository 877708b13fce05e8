"""Readings and plain helpers for tests of editors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.editors import Editor
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import Schedule
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from tests.llada_moe.sampling.toy import EOS, MASK, VOCAB, Logits

DELETE, INSERT = 14, 15


def method(schedule: Schedule, editor: Editor, stop_id: int | None = None, grid: int | None = None) -> Method:
    """Greedy, without a cache."""
    processor = LogitsProcessor(
        needs=frozenset({*schedule.needs, *editor.needs}),
        excluded=[MASK, *{DELETE, INSERT} - set(editor.operations)],
        operations=editor.operations,
    )
    return Method(schedule, editor=editor, logits_processor=processor, stop_id=stop_id, grid=grid)


def probabilities(logits: Logits, tokens: Sequence[int], excluded: Sequence[int] = (MASK, DELETE, INSERT)) -> Tensor:
    """Of every token at every position `[seq, vocab]`."""
    rows = logits(torch.tensor(tokens)).float()
    return rows.index_fill(1, torch.tensor(list(excluded)), -torch.inf).softmax(-1)


def says(tokens: Sequence[int], sure: float = 8.0) -> Tensor:
    """Logits `[seq, vocab]` of a model that is sure of these tokens."""
    return sure * torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


__all__ = ["DELETE", "EOS", "INSERT", "MASK", "VOCAB", "method", "probabilities", "says"]
