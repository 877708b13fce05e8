"""A stand-in for the model: logits as any function of a whole sequence, run pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.loop import Finished, Method, SequenceGroup, Step
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request

VOCAB, MASK, EOS = 16, 3, 2
Logits = Callable[[Tensor], Tensor]
"""[seq] tokens -> [seq, vocab]."""


def bidirectional(seed: int = 0, sharpness: float = 2.0) -> Logits:
    """Logits that depend on every token and on the position, as a bidirectional model's do."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    place = torch.randn(128, VOCAB, generator=generator, dtype=torch.float64)

    def logits(tokens: Tensor) -> Tensor:
        weight = torch.arange(1, len(tokens) + 1, dtype=torch.float64)[:, None]
        mixed = (table[tokens] / weight).sum(0) * 2 + table[tokens] + place[: len(tokens)]
        return mixed * sharpness / 2

    return logits


class Toy:
    """Runs passes over whole sequences (no cache) and remembers what it was shown."""

    def __init__(self, logits: Logits, processor: LogitsProcessor) -> None:
        self.logits = logits
        self.reader = Reader(processor, 0, lambda packet: packet[None])
        self.shown: list[list[list[int]]] = []
        """Of each pass, the tokens of each window."""
        self.wanted: list[list[list[int]]] = []
        """Of each pass, the positions of each window whose logits are wanted."""

    def __call__(self, work: Pass) -> Statistics:
        """One pass."""
        rows, shown, wanted_positions, at = [], [], [], 0
        for window in work.windows:
            assert window.first == 0 and window.width == window.keys, "the toy keeps nothing"
            tokens, wanted = work.tokens[at : at + window.width], work.output_mask[at : at + window.width]
            rows.append(self.logits(tokens)[wanted])
            shown.append(tokens.tolist())
            wanted_positions.append(wanted.nonzero().flatten().tolist())
            at += window.total
        self.shown.append(shown)
        self.wanted.append(wanted_positions)
        return self.reader.read(torch.cat(rows), work.rows)


def steps(group: SequenceGroup, requests: Iterable[Request], run: Callable[[Pass], Statistics]) -> Iterator[Step]:
    """Write all requests, as many at a time as the group has slots, and yield what each pass changed.

    `run` runs the model over a pass and reads its rows of logits.
    """
    waiting = iter(requests)
    while True:
        for slot, request in zip(group.free, waiting, strict=False):
            group.admit(slot, request)
        work = group.plan()
        if work is None:
            return
        yield group.apply(run(work))


def write(
    requests: Sequence[Request], method: Method, logits: Logits | None = None, slots: int | None = None
) -> tuple[list[Finished], Toy, list[Step]]:
    """Write all requests; returns the results in order of their streams, the toy, and the steps."""
    toy = Toy(logits or bidirectional(), method.logits_processor)
    seq = max(len(request.tokens) for request in requests)
    blocks = max(len(request.blocks) for request in requests)
    group = SequenceGroup(method, slots or len(requests), seq, blocks, MASK)
    taken = list(steps(group, requests, toy))
    done = [finished for step in taken for finished in step.finished]
    return sorted(done, key=lambda finished: finished.stream), toy, taken
