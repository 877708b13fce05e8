"""Counts the bytes that this rank sends through its process groups, whoever asks for them.

Every collective of torch passes its dispatcher, also those of Megatron and of backward passes on a CPU; there they are
seen with their tensors and their group. Nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

AGREED = 2
"""Elements up to which a tensor is a few numbers that ranks agree on: losses, norms, flags. Integers are counts."""


SENT: dict[str, tuple[int, Callable[[int], float] | None]] = {
    "allgather_": (1, lambda ranks: ranks - 1),
    "_allgather_base_": (1, lambda ranks: ranks - 1),
    "allgather_into_tensor_coalesced_": (1, lambda ranks: ranks - 1),
    "reduce_scatter_": (0, lambda ranks: ranks - 1),
    "_reduce_scatter_base_": (0, lambda ranks: ranks - 1),
    "reduce_scatter_tensor_coalesced_": (0, lambda ranks: ranks - 1),
    "allreduce_": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "allreduce_coalesced_": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "broadcast_": (0, lambda ranks: (ranks - 1) / ranks),
    "send": (0, lambda ranks: 1.0),
    "alltoall_base_": (1, None),
}
"""Operations of torch's c10d: which argument holds the smaller side of what is sent, and how often it is sent by the
number of ranks; None = by the splits of an all-to-all."""


class TrafficCount(TorchDispatchMode):
    """While it is entered, adds up what is sent; gloo and NCCL may send more or less than these ideal amounts.

    A gather or a scatter of n ranks sends n - 1 parts, a sum over all ranks twice (n - 1) / n of the whole, an
    all-to-all what is for other ranks, a message all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        """Bytes by the name of the group (`ProcessGroup.group_name`), of floating-point tensors of more than
        `AGREED` elements."""
        self.calls: Counter[tuple[str, str, int]] = Counter()
        """How often each (group, operation, elements) was sent."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._note(function.__name__.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _note(self, operation: str, args: tuple[Any, ...]) -> None:
        group = next((_group(each) for each in args if isinstance(each, torch.ScriptObject)), None)
        if group is None or operation not in SENT:
            return
        place, share = SENT[operation]
        for tensor in _tensors(args[place]):
            self.calls[group.group_name, operation, tensor.numel()] += 1
            if tensor.numel() > AGREED and tensor.is_floating_point():
                part = share(group.size()) if share else _for_others(group, args[4])
                self.sent[group.group_name] += round(part * tensor.numel() * tensor.element_size())


def _group(boxed: torch.ScriptObject) -> ProcessGroup | None:
    try:
        return ProcessGroup.unbox(boxed)
    except RuntimeError:  # another object, such as the kind of a reduction
        return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument, which is one, a list, or a list of lists."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for each in value:
        yield from _tensors(each)


def _for_others(group: ProcessGroup, splits: list[int]) -> float:
    """Share of an all-to-all's input that is for other ranks."""
    if not splits:
        return (group.size() - 1) / group.size()
    total = sum(splits)
    return (total - splits[group.rank()]) / total if total else 0.0
