"""A model on many ranks that one of them drives: it scores pairs and writes texts, and the other ranks follow."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.estimators import Estimate, estimate, greedy
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import Pair
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.evaluation.query_scorer import POSITIONS, QueryScorer, kind_of
from llada_megatron.parallel.sampling.checkpoint_tokenizer import checkpoint_tokenizer
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.results import Result
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.parallel.sampling.session import Session

WAIT = datetime.timedelta(days=30)
"""As long may rank 0 be busy alone, with data sets that it fetches or answers that it grades. A rank that is gone
closes its connections, which ends the wait at once."""


class ServedModel:
    """What an evaluation asks of a model. Rank 0 calls the methods; every other rank is in `follow` meanwhile.

    A request goes to all ranks, and each replica takes part in every forward pass or does its share of the texts: the
    ranks of a replica run the same collectives whatever rank 0 asks for.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        protocol: LikelihoodProtocol,
        settings: Settings,
        positions: int = POSITIONS,
        driven: bool = True,
    ) -> None:
        """Collective over all ranks.

        Args:
            loaded: this rank's part of the model.
            protocol: how likelihoods are measured.
            settings: how texts are written, and where the tokenizer is.
            positions: of one pass that scores.
            driven: rank 0 alone calls the methods; otherwise every rank calls them alike, and none is in `follow`.

        Raises:
            ConfigError: the protocol is not one of the model.
            DataError: the tokenizer is missing, or another model's.
        """
        self.kind, self.model, self.loaded = kind_of(loaded), loaded.run.model, loaded
        self.tokenizer = checkpoint_tokenizer(loaded, settings.tokenizer)
        self._positions = positions
        self._ranks = torch.distributed.get_world_size()
        self._announces = driven and self._ranks > 1 and torch.distributed.get_rank() == 0
        self._told = _patient(torch.distributed.group.WORLD) if driven and self._ranks > 1 else None
        self._set(protocol, settings)

    def use(self, protocol: LikelihoodProtocol, settings: Settings) -> None:
        """Measure and write by other settings from now on, with the same tokenizer. Raises what the class does."""
        self._announce("_set", protocol, settings)
        self._set(protocol, settings)

    def _set(self, protocol: LikelihoodProtocol, settings: Settings) -> None:
        self.protocol = protocol.of_model(self.kind.fills_masks, self.kind.verifies)
        self.settings = settings
        self._scorer = QueryScorer(self.loaded, protocol.guidance, self._positions)
        self._session: Session | None = None

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[Estimate]:
        """The log-likelihood of each pair's answer, as the protocol says."""
        self._announce("log_likelihoods", pairs)
        return estimate(self._scorer, pairs, self.protocol, self.kind)

    def greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether greedy decoding, one token a step, writes each pair's answer: as many passes as it has tokens."""
        self._announce("greedy", pairs)
        return greedy(self._scorer, pairs, self.kind)

    def generate(self, prompts: Sequence[Prompt]) -> list[Result]:
        """Continue prompts of different numbers; the results in their order, on every rank.

        Raises:
            ConfigError: an autoregressive model, a method that does not fit the model, or a prompt that is too long.
        """
        self._announce("generate", prompts)
        session = self._sampling()
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        jobs = session.jobs(prompts)
        events = session.run(jobs, lambda requests: requests[replica::replicas])
        own = {result.number: result for event in events for result in event.results}
        if self._ranks > 1:
            parts: list[dict[int, Result]] = [{} for _ in range(self._ranks)]
            group = _patient(torch.distributed.group.WORLD)  # a replica may write for longer than the others
            torch.distributed.all_gather_object(parts, own, group=group)
            own = {number: result for part in parts for number, result in part.items()}
        return [own[prompt.number] for prompt in prompts]

    def room(self, new_tokens: int) -> int:
        """Tokens of a prompt that leave room for so many new ones.

        Raises:
            ConfigError: there is no room for a single one.
        """
        block = self.kind.block or 1
        left = self.model.max_sequence_length // block * block - new_tokens
        if left < 1:
            raise ConfigError(
                f"{new_tokens} new tokens: the model takes {self.model.max_sequence_length} with the prompt"
            )
        return left

    def follow(self) -> None:
        """On every rank but the first: take part in what rank 0 asks for, until it calls `release`."""
        while True:
            told: list[Any] = [None]
            torch.distributed.broadcast_object_list(told, src=0, group=self._told)
            if told[0] is None:
                return
            name, arguments = told[0]
            getattr(self, name)(*arguments)

    def release(self) -> None:
        """On rank 0: let the other ranks return."""
        if self._announces:
            torch.distributed.broadcast_object_list([None], src=0, group=self._told)

    def _announce(self, name: str, *arguments: Any) -> None:
        if self._announces:
            torch.distributed.broadcast_object_list([(name, arguments)], src=0, group=self._told)

    def _sampling(self) -> Session:
        if self._session is None:
            from llada_megatron.parallel.sampling.session import Session

            self._session = Session(self.loaded, self.settings)
        return self._session


@functools.lru_cache(maxsize=1)
def _patient(world: Any) -> Any:
    """A group of all ranks in which they may wait for each other for `WAIT` (collective at its first call)."""
    return torch.distributed.new_group(timeout=WAIT, backend="gloo")
