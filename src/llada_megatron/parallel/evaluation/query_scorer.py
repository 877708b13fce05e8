"""Log-probabilities of expected tokens under a model that is spread over ranks; the logits never leave their shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from llada_megatron.llada_moe.evaluation.queries import ModelKind, Query
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.transfer import to_device
from llada_megatron.llada_moe.model.windows import Window
from llada_megatron.llada_moe.objectives import checkpoint_objective
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows
from llada_megatron.parallel import device, host_group
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.generator import require_layout
from llada_megatron.parallel.sampling.not_finite import not_finite
from llada_megatron.parallel.sampling.pipeline_group import PipelineGroup, SentMessages
from llada_megatron.parallel.sampling.stage import StageRunner, gather_over_tensor_ranks

POSITIONS = 8192
"""Positions of one pass, by default."""
_SHIFT, _SUM, _LABEL = range(3)
"""What a shard says of a row: its largest logit, its sum of exponentials relative to that, and the label's logit."""


@dataclass(frozen=True)
class _Batch:
    """Queries of one pass, and where their rows belong among those of all queries."""

    queries: list[Query]
    places: Tensor
    """`[rows]` int64."""

    @property
    def labels(self) -> Tensor:
        """`[rows]` int64."""
        return torch.tensor([label for query in self.queries for label in query.labels], dtype=torch.int64)


class QueryScorer:
    """Answers queries: a `llada_moe.evaluation.queries.Score`, collective over all ranks of the model's layout.

    Every rank gives the same queries and gets the same answers. Batches of them are dealt out to the replicas, and all
    replicas run equally many passes, so that none waits for another in an exchange of tokens between experts.
    """

    def __init__(self, loaded: LoadedModel, guidance: float = 0.0, positions: int = POSITIONS) -> None:
        """Collective over all ranks.

        Args:
            loaded: this rank's part of the model.
            guidance: weight of classifier-free guidance; above 0 every text is run a second time, its context masked.
            positions: of one pass at most, unless one text alone has more.

        Raises:
            ConfigError: a layout that cannot run parts of sequences.
        """
        config = loaded.model.config
        require_layout(config)
        self._loaded, self._guidance, self._positions = loaded, guidance, positions
        self._pipeline = PipelineGroup(config.hidden_size, config.params_dtype)
        self._replica = parallel_state.get_data_parallel_rank()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._first_id = parallel_state.get_tensor_model_parallel_rank() * (
            loaded.run.model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        )
        self.positions_run = 0
        """Positions that this rank's replica has run, second copies included."""

    def __call__(self, queries: Sequence[Query]) -> list[Tensor]:
        """For each query `[rows, 2]` float64 on the host: log-probability of the label, and of the best token.

        Raises:
            CheckpointError: the model's logits are not finite.
        """
        if not queries:
            return []
        counts = [len(query.rows) for query in queries]
        found = torch.zeros(sum(counts), 2, dtype=torch.float64)
        batches = self._batches(queries, counts)
        capacity = max(query.positions for query in queries)
        runner = StageRunner(self._loaded.model, Method(), 0, capacity)
        sent = SentMessages()
        own = batches[self._replica :: self._replicas]
        for turn in range(-(-len(batches) // self._replicas)):
            if turn == len(own):  # at most once: another replica has one batch more
                runner.idle()
                continue
            values = self._answer(runner, own[turn], sent)
            if values is not None:
                found[own[turn].places] = values
        sent.finish()
        host_group.world().all_reduce(found)  # also makes all ranks agree, bit for bit
        if not bool(found.isfinite().all()):
            raise not_finite(self._loaded)
        return list(found.split(counts))

    def _batches(self, queries: Sequence[Query], counts: Sequence[int]) -> list[_Batch]:
        """Queries in passes, the longest first, so that a lack of memory shows at once; `[x_t ; x_0]` apart."""
        places = list(torch.arange(sum(counts)).split(list(counts)))
        order = sorted(range(len(queries)), key=lambda i: -queries[i].positions)
        groups = [[i for i in order if bool(queries[i].clean) == clean] for clean in (False, True)]
        return [
            _Batch([queries[i] for i in numbers], torch.cat([places[i] for i in numbers]))
            for group in groups
            for numbers in self._filled(group, [query.positions for query in queries])
        ]

    def _filled(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        copies = 2 if self._guidance else 1
        numbers: list[int] = []
        total = 0
        for i in order:
            if numbers and total + copies * lengths[i] > self._positions:
                yield numbers
                numbers, total = [], 0
            numbers.append(i)
            total += copies * lengths[i]
        if numbers:
            yield numbers

    def _answer(self, runner: StageRunner, batch: _Batch, sent: SentMessages) -> Tensor | None:
        """Run this stage. `[rows, 2]` on one rank of a replica's last stage, None on all others."""
        work = self._pass(batch.queries)
        self.positions_run += work.tokens.numel()
        hidden = None if self._pipeline.first else self._pipeline.receive_hidden(work.tokens.numel())
        output = self._in_blocks(work, hidden) if batch.queries[0].clean else runner.forward(work, hidden)
        if not self._pipeline.last:
            sent.finish()
            self._pipeline.send_hidden(output, sent)
            return None
        values = self._log_probabilities(output, batch.labels)
        return values if parallel_state.get_tensor_model_parallel_rank() == 0 else None

    def _pass(self, queries: Sequence[Query]) -> Pass:
        """All texts one after another; with guidance once more, their contexts masked; then their clean halves."""
        mask_id = self._loaded.run.model.mask_token_id
        copies = [False, True] if self._guidance else [False]
        texts, rows = [], []
        for half in ("tokens", "clean"):
            for masked in copies:
                for query in queries:
                    text = list(getattr(query, half))
                    kept = min(query.given, len(text)) if masked else 0
                    texts.append([mask_id] * kept + text[kept:])
                    rows.append(query.rows if half == "tokens" else ())
        asked = torch.zeros(sum(map(len, texts)), dtype=torch.bool)
        start = 0
        for text, own in zip(texts, rows, strict=True):
            asked[[start + row for row in own]] = True
            start += len(text)
        windows = [Window(0, 0, len(text), len(text)) for text in texts if text]
        none = torch.zeros(0, dtype=torch.int64)
        packed = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        return Pass(packed, windows, asked, LogitRows(none, none, none, none, none), none)

    @torch.no_grad()  # layers keep what they make of the boundaries, also for training
    def _in_blocks(self, work: Pass, hidden: Tensor | None) -> Tensor:
        """This stage's layers over texts `[x_t ; x_0]`, as block-diffusion training runs them."""
        model, own = self._loaded.model, self._loaded.model.pattern
        lengths = torch.tensor([0, *(window.width for window in work.windows)])
        if hidden is not None:
            model.set_input_tensor(hidden)
        kind = kind_of(self._loaded)
        model.use_pattern(AttentionPattern(kind.block, doubled=True, causal_clean=kind.verifies))
        try:
            tokens = to_device(work.tokens[None], device.current())
            return model(tokens, lengths.cumsum(0).to(torch.int32), rows=work.output_mask[None])
        finally:
            model.use_pattern(own)

    @torch.inference_mode()
    def _log_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`[rows, 2]` on the host from this shard of the logits (collective over the tensor ranks)."""
        logits = logits.float()
        if self._guidance:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (1.0 + self._guidance) * (conditional - unconditional)
        own = to_device(labels, logits.device) - self._first_id
        inside = (own >= 0) & (own < logits.shape[1])
        label = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        shift = logits.amax(1)
        total = (logits - shift[:, None]).exp().sum(1)
        packet = torch.stack([shift, total, label.masked_fill(~inside, -torch.inf)], dim=1)
        shards = gather_over_tensor_ranks(packet).to("cpu", torch.float64)  # [shards, rows, 3]
        best = shards[..., _SHIFT].amax(0)
        whole = (shards[..., _SUM] * (shards[..., _SHIFT] - best).exp()).sum(0).log()
        return torch.stack([shards[..., _LABEL].amax(0) - best - whole, -whole], dim=1)


def kind_of(loaded: LoadedModel) -> ModelKind:
    """What estimators must know of a loaded model."""
    objective = checkpoint_objective(loaded.run, loaded.metadata)
    return ModelKind(
        mask_id=loaded.run.model.mask_token_id,
        fills_masks=objective.fills_masks,
        block=objective.config.block_size if objective.verifies else loaded.model.pattern.block,
        verifies=objective.verifies,
    )
