"""What ranks tell each other while sequences are written: stages of a replica, and replicas that share experts."""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from llada_megatron.parallel import device, topology


class SentMessages:
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
class ExpectedMessage:
    """A message that is expected."""

    tensor: torch.Tensor
    handle: Any

    def wait(self) -> torch.Tensor:
        """The message, once it is here."""
        self.handle.wait()
        return self.tensor


class PipelineGroup:
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

    def send_hidden(self, hidden: torch.Tensor, sent: SentMessages) -> None:
        """To the next stage; does not wait."""
        hidden = hidden.contiguous()
        sent.add(hidden, torch.distributed.isend(hidden, self._ranks[self.stage + 1], group=self._hidden_group))

    def expect_statistics(self, rows: int, fields: int) -> ExpectedMessage:
        """Packed statistics `[rows, fields]`, to come from the stage before in the round; does not wait."""
        packed = torch.empty(rows, fields)
        before = self._ranks[(self.stage - 1) % self.stages]
        return ExpectedMessage(packed, torch.distributed.irecv(packed, before, group=self._statistics_group))

    def pass_on(self, packed: torch.Tensor, sent: SentMessages) -> None:
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


class Replicas:
    """The data-parallel ranks of one stage: independent of each other, or bound together by their experts."""

    def __init__(self, experts: bool) -> None:
        """`experts`: whether the model has any."""
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        spread = parallel_state.get_expert_tensor_and_model_parallel_group().size() if experts else 1
        # both kinds of groups are runs of consecutive ranks of a stage: one that divides the other lies inside of it
        self.bound = tensor % spread != 0

    def any_works(self, works: bool) -> bool:
        """Whether a replica has something to run, and this one must take part (collective where they are bound)."""
        if not self.bound:
            return works
        flag = torch.tensor([int(works)])
        group = parallel_state.get_data_parallel_group_gloo()
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag.item())
