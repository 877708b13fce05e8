"""Levenshtein editing of LLaDA2.2: beside replacing tokens the model deletes them and makes room for new ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.editors.base import Revision, RunningEditor, require_in_range
from llada_megatron.llada_moe.sampling.schedules import best
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, stretches


@dataclass(frozen=True)
class Levenshtein:
    """Carry out the operations that the model predicts (LLaDA2.2 report), within what is to be written of a block.

    "Delete" removes a position: what follows moves left, and a mask comes in at the end. "Insert" puts a mask before a
    position: what follows moves right, and the last position is lost. A given token neither changes nor moves; it
    bounds the stretch that does.

    Masks that came by operations are told apart from the block's first ones. While there are first ones, a step commits
    at least one more than there are others, so that they run out; after that it commits all, and steps count against
    the budget. A last step then writes text only. A block state that was there before loses its least sure change, one
    more each time, so that deletions and insertions cannot chase each other.

    It needs a model that was trained for it, with ids for the operations.
    """

    edit_threshold: float = 0.0
    """As for `TokenEditing`; published: 0.0."""
    max_post_steps: int = 16
    """Steps in a block that begin with none of its first masks, before the last one."""
    delete_id: int | None = None
    """The model's `delete_token_id`."""
    insert_id: int | None = None
    """The model's `insert_token_id`."""

    needs = frozenset[Need]({"text"})
    edits = True
    reach = 0
    shadow = False

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        require_in_range(self.edit_threshold, self.max_post_steps)

    @property
    def operations(self) -> tuple[int, ...]:
        """See `Editor`."""
        return tuple(i for i in (self.delete_id, self.insert_id) if i is not None)

    def start(self, slots: int, seq: int) -> RunningEditor:
        """See `Editor`. Raises: ConfigError: the ids of the operations are missing."""
        if self.delete_id is None or self.insert_id is None:
            raise ConfigError(
                "editor levenshtein: the model names no delete_token_id and insert_token_id; it needs one that was "
                "trained to insert and delete (LLaDA2.2)"
            )
        return _RunningLevenshtein(self, slots, seq)


@dataclass
class _Memory:
    """What is remembered of a slot's block."""

    post: int = 0
    seen: Counter[tuple[int, ...]] = field(default_factory=Counter)


class _RunningLevenshtein:
    def __init__(self, settings: Levenshtein, slots: int, seq: int) -> None:
        self._settings = settings
        self._first = torch.zeros(slots, seq, dtype=torch.bool)  # the block's first masks, by column
        self._memory = [_Memory() for _ in range(slots)]

    def revise(self, statistics: Statistics, view: ActiveBlock, chosen: Tensor) -> Revision:
        """See `Revising`."""
        if statistics.text is None:
            raise RuntimeError("deleting and inserting needs a second choice; the reading lacks 'text'")
        width = view.masked.shape[1]
        new = view.step_in_block == 0
        first = torch.where(new[:, None], view.masked, self._first[view.slot, :width] & view.masked)
        chosen = chosen | self._floor(statistics, view, chosen, first)
        sure = statistics.confidence > self._settings.edit_threshold
        replaced = view.editable & sure & (statistics.token != view.tokens)
        tokens, masked, done = view.tokens.clone(), view.masked.clone(), torch.zeros_like(new)
        for row, slot in enumerate(view.slot.tolist()):
            if new[row]:
                self._memory[slot] = _Memory()
            if view.masked[row].any() and not chosen[row].any():
                continue
            last = self._is_last(slot, bool(first[row].any()))
            written = self._written(statistics, view, row, chosen[row] | replaced[row], last)
            self._carry_out(written, row, view, tokens, masked, first)
            done[row] = not masked[row].any() and (last or written == {})
        self._first[view.slot, :width] = first
        return Revision(tokens, masked, done)

    def _floor(self, statistics: Statistics, view: ActiveBlock, chosen: Tensor, first: Tensor) -> Tensor:
        """Further positions to commit in rows that commit any: bool `[rows, columns]`."""
        others = (view.masked & ~first).sum(1)
        least = torch.where(first.any(1), others + 1, view.masked.shape[1])
        least = torch.where(chosen.any(1), least, 0)
        known = view.masked & (statistics.confidence > 0)  # a schedule may look at a part of the block only
        short = chosen.sum(1) < least
        return best(statistics.confidence, known, torch.where(short, least, 0))

    def _is_last(self, slot: int, has_first: bool) -> bool:
        """Count the step against the budget; whether it is the one after it."""
        memory = self._memory[slot]
        last = not has_first and memory.post >= self._settings.max_post_steps
        memory.post += not has_first
        return last

    def _written(self, statistics: Statistics, view: ActiveBlock, row: int, at: Tensor, last: bool) -> dict[int, int]:
        """Column -> token or operation of what a row writes at the columns `at`."""
        assert statistics.text is not None
        columns = at.nonzero().flatten().tolist()
        token = {c: int(statistics.token[row, c]) for c in columns}
        text = {c: int(statistics.text[row, c]) for c in columns}
        is_masked = {c: bool(view.masked[row, c]) for c in columns}
        operations = self._settings.operations
        changes = [c for c in columns if not is_masked[c] or token[c] in operations]
        if last:
            dropped = [c for c in changes if token[c] in operations]
        else:
            seen = self._memory[int(view.slot[row])].seen
            own = int(view.end[row] - view.first[row])  # the view is as wide as the batch needs
            state = tuple(view.tokens[row, :own].tolist())
            dropped = sorted(changes, key=lambda c: float(statistics.confidence[row, c]))[: seen[state]]
            seen[state] += 1
        return {c: text[c] if c in dropped else token[c] for c in columns if is_masked[c] or c not in dropped}

    def _carry_out(
        self, written: dict[int, int], row: int, view: ActiveBlock, tokens: Tensor, masked: Tensor, first: Tensor
    ) -> None:
        """Write into a row of `tokens`, `masked` and `first`, each stretch between given tokens by itself."""
        free = view.masked[row] | view.editable[row]
        for start, end in stretches(free):
            cells: list[tuple[int, bool, bool]] = []  # token, masked, one of the first masks
            for column in range(start, end):
                old = int(view.tokens[row, column]), bool(view.masked[row, column]), bool(first[row, column])
                new = written.get(column)
                if new is None:
                    cells.append(old)
                elif new == self._settings.insert_id:
                    cells += [(0, True, False), (old[0], old[1], False)]
                elif new != self._settings.delete_id:
                    cells.append((new, False, False))
            cells = (cells + [(0, True, False)] * (end - start))[: end - start]
            tokens[row, start:end] = torch.tensor([token for token, _, _ in cells])
            masked[row, start:end] = torch.tensor([is_masked for _, is_masked, _ in cells])
            first[row, start:end] = torch.tensor([is_first for _, _, is_first in cells])
