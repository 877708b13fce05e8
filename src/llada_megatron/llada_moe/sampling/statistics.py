"""What a sampler needs to know of a row of logits, computed from shards of the vocabulary that are never gathered.

Each shard reduces a row to a few numbers (a packet), and the packets of all shards give the row's statistics. Ties go
to the lowest token id, as in torch.argmax. Token ids travel as float32, which is exact below 2^24.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.transfer import to_device
from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.step_cache import Credit, CreditAccount, StepCache
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows

Statistic = Literal["entropy", "current", "text", "divergence"]
"""The fields of `Statistics` that are only computed on request."""
Need = Statistic | Credit
"""What a schedule or an editor may request besides token and confidence. Credit changes the logits before all
statistics are computed."""
Gather = Callable[[Tensor], Tensor]
"""Collective: packets `[rows, numbers]` of this shard -> those of all shards in order, `[shards, rows, numbers]`."""
DRAWS_AT_ONCE = 1 << 22
"""Random numbers that exist at a time when tokens are drawn: in float64 they take more memory than the logits."""
_FAR = -1e4
"""Below the logarithm of any probability that matters."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of rows of logits `[rows]`, or of the positions of an active block `[rows, columns]`; on the host."""

    token: Tensor
    """int64: the most probable token, or the one drawn at a temperature."""
    confidence: Tensor
    """float32: its probability under the model (without temperature). 0 where no logits were computed, NaN where one of
    the model's logits, of an excluded id or not, is NaN or infinite."""
    entropy: Tensor | None = None
    """float32: entropy of the distribution, in nats."""
    current: Tensor | None = None
    """float32: probability of the token that the position holds at present."""
    text: Tensor | None = None
    """int64: as `token`, but the best one that is not in `LogitsProcessor.operations`."""
    divergence: Tensor | None = None
    """float32, nats: Kullback-Leibler divergence of the distribution from that of the sequence's previous step; inf
    where the previous step computed no logits for the position."""

    @staticmethod
    def width(needs: Collection[Need]) -> int:
        """How many numbers a row of `packed` has, for statistics computed with these `needs`."""
        return 2 + sum(name in needs for name in get_args(Statistic))

    def packed(self) -> Tensor:
        """All fields as one float32 tensor `[rows, fields]`, to be sent to another rank."""
        present = [getattr(self, field.name) for field in fields(self)]
        return torch.stack([value.float() for value in present if value is not None], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, needs: Collection[Need]) -> Statistics:
        """The inverse of `packed`, for statistics computed with these `needs`."""
        columns = iter(packed.unbind(-1))
        token, confidence = next(columns).long(), next(columns)
        values = {name: next(columns) for name in get_args(Statistic) if name in needs}
        if "text" in values:
            values["text"] = values["text"].long()
        return cls(token, confidence, **values)

    @property
    def finite(self) -> bool:
        """Whether every logit of every row is a finite number. This asks nothing of the device: statistics are here."""
        return bool(self.confidence.isfinite().all())

    def scattered(self, offsets: Tensor, shape: tuple[int, int]) -> Statistics:
        """Statistics of this shape `[rows, columns]`: rows at flattened `offsets` `[rows]`, zeros elsewhere."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Statistics(
            **{
                name: None
                if value is None
                else value.new_zeros(shape[0] * shape[1]).index_copy_(0, offsets, value).view(shape)
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class LogitsProcessor:
    """How logits are turned into statistics, the same for every row of a run."""

    needs: frozenset[Need] = frozenset()
    """Statistics that are computed besides token and confidence."""
    excluded: Sequence[int] = ()
    """Ids that are never chosen and get no probability: the mask token, ids that the tokenizer does not have, the end
    of text in gaps."""
    operations: Sequence[int] = ()
    """Ids that an editor carries out instead of writing them (delete, insert)."""
    temperature: float = 0.0
    """0 = the most probable token; above 0, Gumbel-max sampling in float64."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance: logits + w * (logits - logits without the given text); 0 = off."""
    seed: int = 0
    """Seed of the random draws."""


class Reader:
    """Computes statistics from one shard of the logits together with the other shards, for one group of sequences.

    A position that has no logits in a step loses what was kept of it: its divergence is unknown in the next step, and
    its credit is gone.
    """

    def __init__(self, processor: LogitsProcessor, first_id: int, gather: Gather) -> None:
        """`first_id`: first token id of this shard of the vocabulary; `gather`: see `Gather`."""
        self.processor = processor
        self.packet_bytes = 0
        """Bytes that left this shard for each row in the last call of `read`."""
        self._first = first_id
        self._columns: dict[str, Tensor] = {}
        self._gather = gather
        credit = next((need for need in processor.needs if isinstance(need, Credit)), None)
        self._account = None if credit is None else CreditAccount(credit)
        self._step_cache = StepCache()  # logits of the last step, and their log-normalizers over all shards

    def read(self, logits: Tensor, rows: LogitRows) -> Statistics:
        """Statistics of rows of logits (collective over the shards).

        Args:
            logits: `[rows, vocab / shards]`; with guidance `[2 * rows, vocab / shards]`, where the second half are the
                unconditional rows.
            rows: what identifies the rows.
        """
        logits = logits.float()
        if self.processor.guidance:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (1.0 + self.processor.guidance) * (conditional - unconditional)
        spoilt = (
            logits.sum(-1) * 0.0
        )  # NaN if any logit is NaN or infinite, else 0: it travels within the sum of the row
        logits = self._without(logits, "excluded")
        self.packet_bytes = 0
        if self._account is not None:
            top, whole, token = _merged_choice(self._gathered(self._choice(logits)[0]))
            logits = self._account.raised(logits, self._first, rows, token.long(), 1.0 / whole)
        found, before = self._step_cache.recall(rows)
        packet = self._packet(logits, rows, before)
        packet[1] = packet[1] + spoilt
        packets = self._gathered(packet)
        if "divergence" in self.processor.needs and rows.slot.numel():
            top, whole, _ = _merged_choice(packets)
            self._step_cache.remember(rows, logits, top + whole.log())
        return self._merge(packets.cpu(), found)

    def _gathered(self, packet: list[Tensor]) -> Tensor:
        """The packets of all shards `[shards, rows, numbers]` (collective)."""
        packed = torch.stack(packet, dim=-1)
        self.packet_bytes += packed.shape[-1] * packed.itemsize
        return self._gather(packed)

    def _without(self, logits: Tensor, ids: Literal["excluded", "operations"]) -> Tensor:
        """Logits with -inf at those `ids` of the processor that this shard holds."""
        if ids not in self._columns:  # found once, and kept on the device
            own = [i - self._first for i in getattr(self.processor, ids) if 0 <= i - self._first < logits.shape[1]]
            self._columns[ids] = to_device(torch.tensor(own, dtype=torch.int64), logits.device)
        columns = self._columns[ids]
        return logits.index_fill(1, columns, -torch.inf) if columns.numel() else logits

    def _choice(self, logits: Tensor) -> tuple[list[Tensor], Tensor]:
        """Largest logit of each row, sum of exponentials relative to it, and token; and the exponentials themselves."""
        best, choice = logits.max(-1)
        shift = best.clamp(min=torch.finfo(torch.float32).min)  # a shard of excluded ids alone
        weights = (logits - shift[:, None]).exp()
        return [shift, weights.sum(-1), (choice + self._first).float()], weights

    def _packet(self, logits: Tensor, rows: LogitRows, before: list[Tensor]) -> list[Tensor]:
        """This shard's numbers, each float32 `[rows]`, in the order in which `_merge` reads them.

        `before`: logits and log-normalizers of the previous step; empty if there are none.
        """
        packet, weights = self._choice(logits)
        shift = packet[0]
        if self.processor.temperature:
            packet[2:] = self._drawn(logits, rows)
        if "entropy" in self.processor.needs:
            packet += [(weights * (logits - shift[:, None]).clamp(min=_FAR)).sum(-1)]
        if "current" in self.processor.needs:
            own = to_device(rows.current, logits.device) - self._first
            inside = (own >= 0) & (own < logits.shape[1])
            logit = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            packet += [logit.masked_fill(~inside, -torch.inf)]
        if "text" in self.processor.needs:
            packet += self._text(logits, rows)
        if "divergence" in self.processor.needs:
            change = (logits - shift[:, None]).clamp(min=_FAR)
            if before:
                change -= (before[0] - before[1][:, None]).clamp(min=_FAR)
            packet += [(weights * change).sum(-1)]
        return packet

    def _text(self, logits: Tensor, rows: LogitRows) -> list[Tensor]:
        """The best token that is not an operation, and its score: one float32, or two if the score is perturbed."""
        logits = self._without(logits, "operations")
        if self.processor.temperature:
            return self._drawn(logits, rows)[:3]
        best, choice = logits.max(-1)
        return [(choice + self._first).float(), best]

    def _drawn(self, logits: Tensor, rows: LogitRows) -> list[Tensor]:
        """Gumbel-max sampling: drawn token, its perturbed score (a float64 as a sum of two float32), and its logit."""
        ids = torch.arange(self._first, self._first + logits.shape[1], device=logits.device)
        names = [to_device(n, logits.device)[:, None] for n in (rows.stream, rows.step, rows.position)]
        count = max(1, DRAWS_AT_ONCE // logits.shape[1])
        parts = [
            self._best_drawn(*some, ids=ids) for some in zip(*(x.split(count) for x in (logits, *names)), strict=True)
        ]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _best_drawn(self, logits: Tensor, *names: Tensor, ids: Tensor) -> list[Tensor]:
        """As `_drawn`, for as many rows as are drawn at once."""
        noise = draws.gumbel(self.processor.seed, draws.TOKEN, *names, ids)
        score, choice = noise.mul_(self.processor.temperature).add_(logits).max(-1)
        high = score.float()
        low = (score - high.double()).nan_to_num(0.0).float()
        return [(choice + self._first).float(), high, low, logits.gather(1, choice[:, None]).squeeze(1)]

    def _merge(self, packets: Tensor, found: Tensor) -> Statistics:
        """The statistics of whole rows from the packets `[shards, rows, numbers]`.

        `found`: bool `[rows]`, rows that had logits in the previous step.
        """
        columns = iter(packets.unbind(-1))
        best, total = next(columns), next(columns)
        top = best.amax(0)
        scale = (best - top).exp()
        whole = (total * scale).sum(0)
        token = next(columns)
        if self.processor.temperature:
            score = next(columns).double() + next(columns).double()
            token, logit = _of_the_best(score, token, next(columns))
            confidence = (logit - top).exp() / whole
        else:
            token, _ = _of_the_best(best, token, best)
            confidence = 1.0 / whole
        entropy = current = text = divergence = None
        if "entropy" in self.processor.needs:
            moment = (scale * (next(columns) + (best - top) * total)).sum(0)
            entropy = (whole.log() - moment / whole).clamp(min=0.0)
        if "current" in self.processor.needs:
            current = (next(columns).amax(0) - top).exp() / whole
        if "text" in self.processor.needs:
            text, score = next(columns), next(columns).double()
            if self.processor.temperature:
                score = score + next(columns).double()
            text = _of_the_best(score, text, score)[0].long()
        if "divergence" in self.processor.needs:
            moment = (scale * (next(columns) + (best - top) * total)).sum(0)
            divergence = (moment / whole - whole.log()).clamp(min=0.0).masked_fill(~found, torch.inf)
        return Statistics(token.long(), confidence, entropy, current, text, divergence)


def _merged_choice(packets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge packets that begin with `_choice`: largest logit of a row, sum of exponentials relative to it, token."""
    best, total, token = packets.unbind(-1)[:3]
    top = best.amax(0)
    return top, (total * (best - top).exp()).sum(0), _of_the_best(best, token, best)[0]


def _of_the_best(score: Tensor, token: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Token and value of the shard with the best score, the lowest token on a tie; `[shards, rows]` -> `[rows]`."""
    first = torch.where(score == score.amax(0), token, torch.inf).argmin(0, keepdim=True)
    return token.gather(0, first).squeeze(0), value.gather(0, first).squeeze(0)
