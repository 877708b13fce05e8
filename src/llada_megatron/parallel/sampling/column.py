"""What the pipeline stages of a replica say to each other: hidden states go down, statistics go round.

The last stage gives the statistics of a pass to the first one, which passes them on to the second, and so on: a rank
sends them once, however many stages there are, and each stage has them before the hidden states of the next pass.
"""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from llada_megatron.parallel import device, topology


class Sent:
    """Messages on their way; their tensors must stay until they are taken."""

    def __init__(self) -> None:
        self._messages: list[tuple[torch.Tensor, Any]] = []

    def add(self, tensor: torch.Tensor, handle: Any) -> None:
        """One more."""
        self._messages.append((tensor, handle))

    def finish(self) -> None:
        """Wait until all are taken."""
        for _, handle in self._messages:
            handle.wait()
        self._messages.clear()


@dataclass(frozen=True)
class Arriving:
    """A message that is expected."""

    tensor: torch.Tensor
    handle: Any

    def wait(self) -> torch.Tensor:
        """The message, once it is here."""
        self.handle.wait()
        return self.tensor


class Column:
    """The ranks of all stages with one tensor rank in one replica."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        """`hidden_size` and `dtype` of the hidden states. Collective over the world."""
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self._hidden_size, self._dtype = hidden_size, dtype
        if self.stages > 1:
            self._hidden_group = parallel_state.get_pipeline_model_parallel_group()
            self._ranks = torch.distributed.get_process_group_ranks(self._hidden_group)
            self._statistics_group = _host_groups(torch.distributed.group.WORLD)

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == self.stages - 1

    @property
    def passes_on(self) -> bool:
        """Whether the next stage has its statistics from this one."""
        return self.stages > 1 and (self.stage + 1) % self.stages != self.stages - 1

    def receive_hidden(self, total: int) -> torch.Tensor:
        """`[total, 1, hidden]` from the stage before."""
        hidden = torch.empty(total, 1, self._hidden_size, dtype=self._dtype, device=device.current())
        torch.distributed.irecv(hidden, self._ranks[self.stage - 1], group=self._hidden_group).wait()
        return hidden

    def send_hidden(self, hidden: torch.Tensor, sent: Sent) -> None:
        """To the next stage; does not wait."""
        hidden = hidden.contiguous()
        sent.add(hidden, torch.distributed.isend(hidden, self._ranks[self.stage + 1], group=self._hidden_group))

    def expect_statistics(self, rows: int, fields: int) -> Arriving:
        """Packed statistics `[rows, fields]`, to come from the stage before in the round; does not wait."""
        packed = torch.empty(rows, fields)
        before = self._ranks[(self.stage - 1) % self.stages]
        return Arriving(packed, torch.distributed.irecv(packed, before, group=self._statistics_group))

    def pass_on(self, packed: torch.Tensor, sent: Sent) -> None:
        """Give statistics to the next stage of the round; does not wait."""
        after = self._ranks[(self.stage + 1) % self.stages]
        sent.add(packed, torch.distributed.isend(packed, after, group=self._statistics_group))


@functools.lru_cache(maxsize=1)
def _host_groups(world: Any) -> Any:
    """This rank's column as a group for host tensors (collective over the world, made once for it).

    A communicator of their own, because messages of two kinds between the same ranks on one of NCCL's can block each
    other; and on the host, because the loop reads them there.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    across, rank = world.size() // stages, world.rank()  # stages are the slowest axis of the ranks
    limit = datetime.timedelta(seconds=topology.TIME_LIMIT_S)
    columns = [
        torch.distributed.new_group(list(range(first, world.size(), across)), timeout=limit, backend="gloo")
        for first in range(across)
    ]
    return columns[rank % across]
