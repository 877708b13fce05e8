"""What a sampler needs to know of a row of logits, read from shards of the vocabulary that never meet.

Each shard says a few numbers of a row (a packet); the packets of all shards make the row's statistics. Ties go to the
lowest token id, as torch.argmax has it. Ids travel as float32, exact below 2^24.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import row_memory
from llada_megatron.llada_moe.sampling.row_memory import Credit, CreditAccount, StepCache
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows

Statistic = Literal["entropy", "current", "text", "divergence"]
"""The fields of `Statistics` that are read where they are asked for."""
Need = Statistic | Credit
"""What a schedule or an editor may ask for beside token and confidence; credit changes what all of these say."""
Gather = Callable[[Tensor], Tensor]
"""Packets `[rows, numbers]` of this shard -> those of all shards in order `[shards, rows, numbers]` (collective)."""
DRAWS_AT_ONCE = 1 << 22
"""Random numbers of a vocabulary's noise that exist at a time: in float64 they take more memory than the logits."""
_FAR = -1e4
"""Below any logarithm of a probability that counts."""


@dataclass(frozen=True)
class Statistics:
    """Of each row, or of each position of a view (then `[rows, columns]`); on the host."""

    token: Tensor
    """int64: the most probable token, or the one drawn at a temperature."""
    confidence: Tensor
    """float32: its probability under the model (without temperature). 0 where a position was not asked for."""
    entropy: Tensor | None = None
    """float32, nats."""
    current: Tensor | None = None
    """float32: probability of the token that stands there."""
    text: Tensor | None = None
    """int64: as `token`, the best that is none of `Reading.operations`."""
    divergence: Tensor | None = None
    """float32, nats: Kullback-Leibler divergence of the distribution from the one of the sequence's step before; inf
    where the position was not asked for then."""

    @staticmethod
    def width(needs: Collection[Need]) -> int:
        """Numbers of a row in `packed`, of statistics read with these `needs`."""
        return 2 + sum(name in needs for name in get_args(Statistic))

    def packed(self) -> Tensor:
        """`[rows, fields]` float32, for another rank."""
        present = [getattr(self, field.name) for field in fields(self)]
        return torch.stack([value.float() for value in present if value is not None], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, needs: Collection[Need]) -> Statistics:
        """From `packed`, of statistics read with these `needs`."""
        columns = iter(packed.unbind(-1))
        token, confidence = next(columns).long(), next(columns)
        values = {name: next(columns) for name in get_args(Statistic) if name in needs}
        if "text" in values:
            values["text"] = values["text"].long()
        return cls(token, confidence, **values)

    def placed(self, place: Tensor, shape: tuple[int, int]) -> Statistics:
        """Rows put at the offsets `place` `[rows]` of a flattened view of this shape; zeros elsewhere."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Statistics(
            **{
                name: None
                if value is None
                else value.new_zeros(shape[0] * shape[1]).index_copy_(0, place, value).view(shape)
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class LogitsProcessor:
    """How logits are read, the same for every row of a run."""

    needs: frozenset[Need] = frozenset()
    excluded: Sequence[int] = ()
    """Ids that are never chosen and take no probability: the mask token, ids without a token, end of text in gaps."""
    operations: Sequence[int] = ()
    """Ids that an editor carries out instead of writing them (delete, insert)."""
    temperature: float = 0.0
    """0 = the most probable token; above it Gumbel-max sampling in float64."""
    guidance: float = 0.0
    """Classifier-free guidance w: logits + w * (logits - logits without the given text); 0 = off."""
    seed: int = 0


class Reader:
    """Reads one shard of the logits together with the other shards, step by step: one reader for one group.

    A row is not followed over a reading that leaves it out: its divergence is unknown then, and its credit lost.
    """

    def __init__(self, reading: LogitsProcessor, first_id: int, gather: Gather) -> None:
        """`first_id`: of this shard of the vocabulary; `gather`: see `Gather`."""
        self.reading = reading
        self.packet_bytes = 0
        """Bytes of a row that left this shard in the last reading."""
        self._first = first_id
        self._places: dict[str, Tensor] = {}
        self._gather = gather
        credit = next((need for need in reading.needs if isinstance(need, Credit)), None)
        self._account = None if credit is None else CreditAccount(credit)
        self._before = StepCache()  # logits, and the logarithms of their sums over all shards

    def read(self, logits: Tensor, rows: LogitRows) -> Statistics:
        """Statistics of the rows (collective over the shards).

        Args:
            logits: `[rows, vocab / shards]`; with guidance `[2 * rows, ...]`, those without the given text behind.
            rows: names of the rows.
        """
        logits = logits.float()
        if self.reading.guidance:
            given, blank = logits.chunk(2)
            logits = blank + (1.0 + self.reading.guidance) * (given - blank)
        logits = self._without(logits, "excluded")
        self.packet_bytes = 0
        if self._account is not None:
            top, whole, token = _merged_choice(self._gathered(self._choice(logits)[0]))
            logits = self._account.raised(logits, self._first, rows, token.long(), 1.0 / whole)
        found, before = self._before.recall(rows)
        packets = self._gathered(self._packet(logits, rows, before))
        if "divergence" in self.reading.needs and rows.slot.numel():
            top, whole, _ = _merged_choice(packets)
            self._before.remember(rows, logits, top + whole.log())
        return self._merge(packets.cpu(), found)

    def _gathered(self, packet: list[Tensor]) -> Tensor:
        """The packets of all shards `[shards, rows, numbers]` (collective)."""
        packed = torch.stack(packet, dim=-1)
        self.packet_bytes += packed.shape[-1] * packed.itemsize
        return self._gather(packed)

    def _without(self, logits: Tensor, ids: Literal["excluded", "operations"]) -> Tensor:
        """Logits with -inf at the ids of that name which this shard holds; where those lie is found once."""
        if ids not in self._places:
            own = [i - self._first for i in getattr(self.reading, ids) if 0 <= i - self._first < logits.shape[1]]
            self._places[ids] = torch.tensor(own, dtype=torch.int64, device=logits.device)
        places = self._places[ids]
        return logits.index_fill(1, places, -torch.inf) if places.numel() else logits

    def _choice(self, logits: Tensor) -> tuple[list[Tensor], Tensor]:
        """The largest logit, the sum of exponentials relative to it, the token; and these exponentials."""
        best, choice = logits.max(-1)
        shift = best.clamp(min=torch.finfo(torch.float32).min)  # a shard of excluded ids alone
        weights = (logits - shift[:, None]).exp()
        return [shift, weights.sum(-1), (choice + self._first).float()], weights

    def _packet(self, logits: Tensor, rows: LogitRows, before: list[Tensor]) -> list[Tensor]:
        """This shard's numbers of each row, each float32 `[rows]`; `_merge` reads them in this order.

        `before`: logits and normalizers of the step before, if there are any.
        """
        packet, weights = self._choice(logits)
        shift = packet[0]
        if self.reading.temperature:
            packet[2:] = self._drawn(logits, rows)
        if "entropy" in self.reading.needs:
            packet += [(weights * (logits - shift[:, None]).clamp(min=_FAR)).sum(-1)]
        if "current" in self.reading.needs:
            own = rows.current.to(logits.device) - self._first
            inside = (own >= 0) & (own < logits.shape[1])
            there = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            packet += [there.masked_fill(~inside, -torch.inf)]
        if "text" in self.reading.needs:
            packet += self._text(logits, rows)
        if "divergence" in self.reading.needs:
            change = (logits - shift[:, None]).clamp(min=_FAR)
            if before:
                change -= (before[0] - before[1][:, None]).clamp(min=_FAR)
            packet += [(weights * change).sum(-1)]
        return packet

    def _text(self, logits: Tensor, rows: LogitRows) -> list[Tensor]:
        """The best token that is no operation, and its score: as one float32, or as two of a perturbed one."""
        logits = self._without(logits, "operations")
        if self.reading.temperature:
            return self._drawn(logits, rows)[:3]
        best, choice = logits.max(-1)
        return [(choice + self._first).float(), best]

    def _drawn(self, logits: Tensor, rows: LogitRows) -> list[Tensor]:
        """The best perturbed score (a float64 as the sum of two float32), its token, and its logit."""
        ids = torch.arange(self._first, self._first + logits.shape[1], device=logits.device)
        names = [n.to(logits.device)[:, None] for n in (rows.stream, rows.step, rows.position)]
        count = max(1, DRAWS_AT_ONCE // logits.shape[1])
        parts = [
            self._best_drawn(*some, ids=ids) for some in zip(*(x.split(count) for x in (logits, *names)), strict=True)
        ]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _best_drawn(self, logits: Tensor, *names: Tensor, ids: Tensor) -> list[Tensor]:
        """The same of some rows."""
        noise = row_memory.gumbel(self.reading.seed, row_memory.TOKEN, *names, ids)
        score, choice = noise.mul_(self.reading.temperature).add_(logits).max(-1)
        high = score.float()
        low = (score - high.double()).nan_to_num(0.0).float()
        return [(choice + self._first).float(), high, low, logits.gather(1, choice[:, None]).squeeze(1)]

    def _merge(self, packets: Tensor, found: Tensor) -> Statistics:
        """The statistics of whole rows from the packets `[shards, rows, numbers]`.

        `found`: bool `[rows]`, rows that were read in the step before.
        """
        columns = iter(packets.unbind(-1))
        best, total = next(columns), next(columns)
        top = best.amax(0)
        scale = (best - top).exp()
        whole = (total * scale).sum(0)
        token = next(columns)
        if self.reading.temperature:
            score = next(columns).double() + next(columns).double()
            token, logit = _of_the_best(score, token, next(columns))
            confidence = (logit - top).exp() / whole
        else:
            token, _ = _of_the_best(best, token, best)
            confidence = 1.0 / whole
        entropy = current = text = divergence = None
        if "entropy" in self.reading.needs:
            moment = (scale * (next(columns) + (best - top) * total)).sum(0)
            entropy = (whole.log() - moment / whole).clamp(min=0.0)
        if "current" in self.reading.needs:
            current = (next(columns).amax(0) - top).exp() / whole
        if "text" in self.reading.needs:
            text, score = next(columns), next(columns).double()
            if self.reading.temperature:
                score = score + next(columns).double()
            text = _of_the_best(score, text, score)[0].long()
        if "divergence" in self.reading.needs:
            moment = (scale * (next(columns) + (best - top) * total)).sum(0)
            divergence = (moment / whole - whole.log()).clamp(min=0.0).masked_fill(~found, torch.inf)
        return Statistics(token.long(), confidence, entropy, current, text, divergence)


def _merged_choice(packets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of packets that begin as `_choice` has it: the largest logit of a row, the sum relative to it, the token."""
    best, total, token = packets.unbind(-1)[:3]
    top = best.amax(0)
    return top, (total * (best - top).exp()).sum(0), _of_the_best(best, token, best)[0]


def _of_the_best(score: Tensor, token: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Token and value of the shard with the best score, the lowest token among equals; `[shards, rows]` -> `[rows]`."""
    first = torch.where(score == score.amax(0), token, torch.inf).argmin(0, keepdim=True)
    return token.gather(0, first).squeeze(0), value.gather(0, first).squeeze(0)
