"""Communication between ranks during sampling: stages of a replica, and replicas that share experts.

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

from llada_megatron.parallel import device, host_group


class SentMessages:
    """Messages that were sent and may not be received yet; their tensors must be kept until then."""

    def __init__(self) -> None:
        self._messages: list[tuple[torch.Tensor, Any]] = []

    def add(self, tensor: torch.Tensor, handle: Any) -> None:
        """Keep `tensor` until `handle`, the handle of its send, is complete."""
        self._messages.append((tensor, handle))

    def finish(self) -> None:
        """Wait until all messages are received."""
        for _, handle in self._messages:
            handle.wait()
        self._messages.clear()


@dataclass(frozen=True)
class ExpectedMessage:
    """A message that is being received."""

    tensor: torch.Tensor
    handle: Any

    def wait(self) -> torch.Tensor:
        """Wait for the message, and return it."""
        self.handle.wait()
        return self.tensor


class PipelineGroup:
    """The pipeline group of this rank: the ranks of all stages that have its tensor rank and its replica.

    Hidden states go from each stage to the next. Statistics go from the last stage around the ring of stages, through
    the first one, to the last but one.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Collective over the world; `hidden_size` and `dtype` are those of the hidden states."""
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self._hidden_size, self._dtype = hidden_size, dtype
        if self.stages > 1:
            self._hidden_group = parallel_state.get_pipeline_model_parallel_group()
            self._ranks = torch.distributed.get_process_group_ranks(self._hidden_group)
            self._statistics_group = _host_group(torch.distributed.group.WORLD)

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
        """Whether this stage sends statistics on to the next one of the ring."""
        return self.stages > 1 and (self.stage + 1) % self.stages != self.stages - 1

    def receive_hidden(self, total: int) -> torch.Tensor:
        """Hidden states `[total, 1, hidden]` from the previous stage; waits for them."""
        hidden = torch.empty(total, 1, self._hidden_size, dtype=self._dtype, device=device.current())
        torch.distributed.irecv(hidden, self._ranks[self.stage - 1], group=self._hidden_group).wait()
        return hidden

    def send_hidden(self, hidden: torch.Tensor, sent: SentMessages) -> None:
        """Send hidden states `[total, 1, hidden]` to the next stage, without waiting."""
        hidden = hidden.contiguous()
        sent.add(hidden, torch.distributed.isend(hidden, self._ranks[self.stage + 1], group=self._hidden_group))

    def expect_statistics(self, rows: int, fields: int) -> ExpectedMessage:
        """Begin to receive packed statistics `[rows, fields]` from the previous stage of the ring, without waiting."""
        packed = torch.empty(rows, fields)
        previous = self._ranks[(self.stage - 1) % self.stages]
        return ExpectedMessage(packed, torch.distributed.irecv(packed, previous, group=self._statistics_group))

    def pass_on(self, packed: torch.Tensor, sent: SentMessages) -> None:
        """Send statistics to the next stage of the ring, without waiting."""
        following = self._ranks[(self.stage + 1) % self.stages]
        sent.add(packed, torch.distributed.isend(packed, following, group=self._statistics_group))


@functools.lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    """The pipeline group of this rank once more, for tensors on the host (collective over the world, made once).

    Statistics have a communicator of their own, because two kinds of messages between the same ranks can block each
    other on one NCCL communicator. It is on the host, because the sampling loop reads statistics there.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    across, rank = world.size() // stages, world.rank()  # stages are the slowest axis of the ranks
    limit = datetime.timedelta(seconds=host_group.TIME_LIMIT_S)
    groups = [
        torch.distributed.new_group(list(range(first, world.size(), across)), timeout=limit, backend="gloo")
        for first in range(across)
    ]
    return groups[rank % across]


class Replicas:
    """The data-parallel replicas of one stage, which are independent of each other or share experts."""

    def __init__(self, experts: bool) -> None:
        """`experts`: whether the model has experts."""
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        spread = parallel_state.get_expert_tensor_and_model_parallel_group().size() if experts else 1
        # Both kinds of groups are runs of consecutive ranks of a stage. If the expert group's size divides the tensor
        # group's, it lies inside of one tensor group and so inside of one replica.
        self.share_experts = tensor % spread != 0

    def any_has_work(self, has_work: bool) -> bool:
        """Whether this replica must run a pass: it has work, or one that it shares experts with has.

        Collective over the replicas where they share experts.
        """
        if not self.share_experts:
            return has_work
        flag = torch.tensor([int(has_work)])
        host_group.data_parallel().all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
