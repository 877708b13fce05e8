"""Levenshtein editing of LLaDA2.2: the model replaces tokens, deletes them, and makes room for new ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.editors.editor import Revision, RunningEditor, require_in_range
from llada_megatron.llada_moe.sampling.schedules import best
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, stretches


@dataclass(frozen=True)
class Levenshtein:
    """Carry out the operations that the model predicts (LLaDA2.2 report) on the positions of a block that may change.

    "Delete" removes a position: what follows moves left, and a mask comes in at the end. "Insert" puts a mask before a
    position: what follows moves right, and the last position is lost. A given token neither changes nor moves, so each
    run of positions between given tokens is edited by itself.

    Masks that operations put in are distinguished from the initial masks of the block. While initial masks are left, a
    step commits at least one position more than there are other masks, so that the initial ones run out. After that a
    step commits all masks and counts against `max_post_steps`; when these are spent, one last step writes text only.
    Each time a block returns to an earlier state, one more of the least confident changes is dropped, so that deletions
    and insertions cannot alternate for ever.

    The rule needs a model that was trained for it, with ids for the operations.
    """

    edit_threshold: float = 0.0
    """A written token is replaced by one more probable than this, as in `TokenEditing`; the published value is 0.0."""
    max_post_steps: int = 16
    """Steps in a block that begin without any initial mask, before the last step."""
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
        """Implements `Editor.operations`."""
        return tuple(i for i in (self.delete_id, self.insert_id) if i is not None)

    def start(self, slots: int, seq: int) -> RunningEditor:
        """Implements `Editor.start`.

        Raises:
            ConfigError: the ids of the operations are missing.
        """
        if self.delete_id is None or self.insert_id is None:
            raise ConfigError(
                "editor levenshtein: the model names no delete_token_id and insert_token_id; it needs one that was "
                "trained to insert and delete (LLaDA2.2)"
            )
        return _RunningLevenshtein(self, slots, seq)


@dataclass
class _BlockHistory:
    """What is remembered of the current block of a slot."""

    post_steps: int = 0
    """Steps that began without any initial mask."""
    states: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How often a step began with these tokens."""


class _RunningLevenshtein:
    def __init__(self, settings: Levenshtein, slots: int, seq: int) -> None:
        self._settings = settings
        self._initial = torch.zeros(slots, seq, dtype=torch.bool)  # initial masks of the block that are left, by column
        self._history = [_BlockHistory() for _ in range(slots)]

    def revise(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Revision:
        """Implements `RunningEditor.revise`."""
        if statistics.text is None:
            raise RuntimeError("deleting and inserting needs the best text token: the statistics lack 'text'")
        width = block.masked.shape[1]
        new = block.step_in_block == 0
        initial = torch.where(new[:, None], block.masked, self._initial[block.slot, :width] & block.masked)
        chosen = chosen | self._floor(statistics, block, chosen, initial)
        sure = statistics.confidence > self._settings.edit_threshold
        replaced = block.editable & sure & (statistics.token != block.tokens)
        tokens, masked, done = block.tokens.clone(), block.masked.clone(), torch.zeros_like(new)
        for row, slot in enumerate(block.slot.tolist()):
            if new[row]:
                self._history[slot] = _BlockHistory()
            if block.masked[row].any() and not chosen[row].any():
                continue
            last = self._is_last(slot, bool(initial[row].any()))
            written = self._written(statistics, block, row, chosen[row] | replaced[row], last)
            self._carry_out(written, row, block, tokens, masked, initial)
            done[row] = not masked[row].any() and (last or written == {})
        self._initial[block.slot, :width] = initial
        return Revision(tokens, masked, done)

    def _floor(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor, initial: Tensor) -> Tensor:
        """The positions that rows which commit any must commit at least: bool `[rows, columns]`."""
        others = (block.masked & ~initial).sum(1)
        least = torch.where(initial.any(1), others + 1, block.masked.shape[1])
        least = torch.where(chosen.any(1), least, 0)
        known = block.masked & (statistics.confidence > 0)  # a schedule may look at a part of the block only
        short = chosen.sum(1) < least
        return best(statistics.confidence, known, torch.where(short, least, 0))

    def _is_last(self, slot: int, has_initial: bool) -> bool:
        """Count a step that begins without initial masks; returns whether it must be the last one of the block."""
        history = self._history[slot]
        last = not has_initial and history.post_steps >= self._settings.max_post_steps
        history.post_steps += not has_initial
        return last

    def _written(self, statistics: Statistics, block: ActiveBlock, row: int, at: Tensor, last: bool) -> dict[int, int]:
        """What a row writes at the columns `at`, as column -> token or operation; dropped changes are not in it."""
        assert statistics.text is not None
        columns = at.nonzero().flatten().tolist()
        token = {c: int(statistics.token[row, c]) for c in columns}
        text = {c: int(statistics.text[row, c]) for c in columns}
        is_masked = {c: bool(block.masked[row, c]) for c in columns}
        operations = self._settings.operations
        changes = [c for c in columns if not is_masked[c] or token[c] in operations]
        if last:
            dropped = [c for c in changes if token[c] in operations]
        else:
            states = self._history[int(block.slot[row])].states
            own = int(block.end[row] - block.first[row])  # other rows may be wider
            state = tuple(block.tokens[row, :own].tolist())
            dropped = sorted(changes, key=lambda c: float(statistics.confidence[row, c]))[: states[state]]
            states[state] += 1
        return {c: text[c] if c in dropped else token[c] for c in columns if is_masked[c] or c not in dropped}

    def _carry_out(
        self, written: dict[int, int], row: int, block: ActiveBlock, tokens: Tensor, masked: Tensor, initial: Tensor
    ) -> None:
        """Update a row of `tokens`, `masked` and `initial`, each run of positions between given tokens by itself."""
        free = block.masked[row] | block.editable[row]
        for start, end in stretches(free):
            cells: list[tuple[int, bool, bool]] = []  # token, whether masked, whether an initial mask
            for column in range(start, end):
                old = int(block.tokens[row, column]), bool(block.masked[row, column]), bool(initial[row, column])
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
            initial[row, start:end] = torch.tensor([is_initial for _, _, is_initial in cells])
