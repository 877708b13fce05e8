"""Replicas that share experts run the same number of passes, whatever each of them has to write."""

from __future__ import annotations

import torch
from megatron.core import parallel_state


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
