"""What a CUDA graph is, on a CPU: the operations of one pass on the tensors of that pass, run again without any Python.

Whatever the host knew while the pass was recorded (numbers, shapes, choices) is fixed; only what the tensors hold
changes. Between replays all tensors are spoilt that a later replay must write or be given anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")
"""Operations that cannot be in a graph, since the host waits for their result or for its size."""


class OperationRecorder:
    """A `Recorder` that needs no GPU."""

    def __init__(self) -> None:
        self.nbytes, self.left = 0, None
        self.recorded: list[RecordedOperations] = []

    def record(self, run: Callable[[], torch.Tensor]) -> RecordedOperations:
        run()
        self.recorded.append(RecordedOperations(run))
        return self.recorded[-1]


class RecordedOperations(TorchDispatchMode):
    """The operations of a function, and its result."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.replays = 0
        self._operations: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        with self:
            self.output = run()
        made = {id(tensor) for *_, fresh in self._operations for tensor in fresh}
        given = [tensor for _, args, kwargs, _ in self._operations for tensor in _tensors((args, kwargs))]
        self._inputs = [each for each in given if each.dtype is torch.int64 and not _inside(each, made, given)]
        self._addresses = [tensor.data_ptr() for tensor in given]
        self._given = given

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in HOST_READS, f"the host waits for {name}"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert all(each is None or each.dtype is not torch.bool for each in indices), f"{name} by a mask"
        out = func(*args, **kwargs)
        before = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in _tensors(out) if tensor.untyped_storage().data_ptr() not in before]
        self._operations.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        assert [tensor.data_ptr() for tensor in self._given] == self._addresses
        self.replays += 1
        for *_, fresh in self._operations:
            for tensor in fresh:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        for func, args, kwargs, fresh in self._operations:
            before = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            out = [t for t in _tensors(func(*args, **kwargs)) if t.untyped_storage().data_ptr() not in before]
            for kept, new in zip(fresh, out, strict=True):
                kept.copy_(new)
        for tensor in self._inputs:
            tensor.fill_(1 << 40)  # no token, position, slot or row


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _inside(tensor: torch.Tensor, made: set[int], given: list[torch.Tensor]) -> bool:
    """Whether a tensor, or the one that it is a view of, was made while recording."""
    storage = tensor.untyped_storage().data_ptr()
    return any(id(one) in made and one.untyped_storage().data_ptr() == storage for one in [tensor, *given])
