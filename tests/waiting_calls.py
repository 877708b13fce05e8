"""Which calls of torch wait for a GPU: what `tests.host_waits` sees of a run, operator by operator and call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from tests.host_waits import HostWaits

DEVICE = torch.device("cpu", 0)
"""What stands for the GPU; `torch.device("cpu")` is another."""
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__",
         "__repr__", "__reduce_ex__"}  # fmt: skip
"""Calls that read a tensor, most of them past the operators."""
FROM_DATA = {"tensor", "as_tensor", "asarray", "new_tensor"}
VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of operators whose Python value, or whose result's shape, depends on the values of a tensor."""
WRITES = {"copy_", "__setitem__"}
"""Calls that may copy between host and device."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_device_of, _is_cuda = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__


class Operators(TorchDispatchMode):
    """What operators compute from tensors of the device is the device's."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, which takes seconds of each process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        on_device = any(map(self._waits.marked, given))
        if on_device:
            self._look(func, args, kwargs)
        out = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:  # whose it is stays as it was
            return out
        # inside of an assignment torch.vmap numbers what it writes to, on the device of that
        numbers = func is torch.ops.aten.arange.default and self._waits.called == "__setitem__"
        if on_device or numbers or kwargs.get("device") == DEVICE:
            self._waits.mark(*(leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)))
            if on_device and func.namespace == "c10d":  # fills the tensors it is given
                self._waits.mark(*given)
        return out

    def _look(self, func: Any, args: Any, kwargs: Any) -> None:
        """Record what an operator waits for that is given a tensor of the device."""
        name = func.overloadpacket.__name__
        if name == "copy_" and self._waits.called in WRITES:  # gloo copies too, where NCCL works on the device
            self._look_at_copy(*args, **kwargs)
        elif name in INDEXING:
            self._look_at_index(name, *args[:3])
        elif name == "repeat_interleave":
            if torch.is_tensor(args[-1]) and kwargs.get("output_size") is None:
                self._waits.record(name)
        elif VALUE_TAGS & set(func.tags):
            self._waits.record(name)

    def _look_at_copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
        down = self._waits.marked(source)
        if down != self._waits.marked(to):
            self._waits.record_copy("copy_", to if down else source, down, non_blocking)

    def _look_at_index(self, name: str, tensor: torch.Tensor, index: Any, value: torch.Tensor | None = None) -> None:
        """An index of the host is copied, and so is a number that is written to an index. The places of a mask are
        counted, unless a number is written to them: a fill (torch's TensorAdvancedIndexingUtils.h)."""
        parts = [part for part in index if part is not None]
        masks = [part for part in parts if part.dtype in (torch.bool, torch.uint8)]
        on_host = any(part.numel() and not self._waits.marked(part) for part in parts)
        number = value is not None and value.numel() == 1 and not self._waits.marked(value)
        if number and len(masks) == len(parts) == 1 and not on_host:
            return
        if on_host:
            self._waits.record(f"{name}(host index)")
        elif masks:
            self._waits.record(name)
        if number:
            self._waits.record(f"{name}(host value)")


class Calls(TorchFunctionMode):
    """Calls that name a device, and those that read a tensor."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args else None
        if func == _device_of:
            return DEVICE if self._waits.marked(subject) else func(*args, **kwargs)
        if func == _is_cuda:
            return self._waits.marked(subject)
        name = getattr(func, "__name__", "")
        if name == "type_name":  # `device` answers for Tensor.type, and is asked a second time by this call
            return func(*args, **kwargs).replace("torch.cuda.", "torch.")
        if name in READS and self._waits.marked(subject):
            self._waits.record(name)
            return self._fresh(func, args, kwargs)
        if name in FROM_DATA:
            return self._from_data(name, func, args, kwargs)
        if name == "to":
            return self._to(func, args, kwargs)
        self._waits.called = name
        out = func(*args, **kwargs)
        self._waits.called = ""
        if torch.is_tensor(out) and kwargs.get("device") is not None and not _is_device(kwargs["device"]):
            self._waits.unmark(out)  # like a tensor of the device, and on the host
        return out

    def _fresh(self, func: Callable, args: Any, kwargs: Any) -> Any:
        """The result, in memory of its own, as the host's."""
        with self._waits.paused():
            out = func(*args, **kwargs)
            return out.clone() if torch.is_tensor(out) else out

    def _from_data(self, name: str, func: Callable, args: Any, kwargs: Any) -> Any:
        """`torch.tensor` and its like read tensors in a list one by one, and copy what they made."""
        like, data = args[:2] if name == "new_tensor" else (None, args[0])
        here = self._waits.marked(data)
        where = kwargs.get("device")
        there = _is_device(where) if where is not None else here or self._waits.marked(like)
        read = 0 if torch.is_tensor(data) else sum(map(self._waits.marked, tree_leaves(data)))
        if read:
            self._waits.record(f"{name}(of tensors)", read)
        if there == here and torch.is_tensor(data):
            return func(*args, **kwargs)
        if there != here:
            self._waits.record(f"{name}({'device' if there else 'host'})")
        out = self._fresh(func, args, kwargs)
        if there:
            self._waits.mark(out)
        return out

    def _to(self, func: Callable, args: Any, kwargs: Any) -> Any:
        subject, *rest = args
        here, target = self._waits.marked(subject), _target(rest, kwargs)
        there = here if target is None else self._waits.marked(target) or _is_device(target)
        if there == here:
            return func(*args, **kwargs)
        non_blocking = kwargs.get("non_blocking", next((value for value in rest if isinstance(value, bool)), False))
        if there or not non_blocking:  # without blocking, to the host is into pinned memory that torch allocates
            self._waits.record_copy("to", subject, here, non_blocking)
        out = self._fresh(func, args, kwargs)
        if there:
            self._waits.mark(out)
            return out
        return self._waits.pin(out) if non_blocking else out


def _target(arguments: Any, named: Any) -> Any:
    """What the arguments of `Tensor.to` say of the device: a device, a tensor whose device is meant, or nothing."""
    for value in (named.get("device"), named.get("other"), *arguments):
        if isinstance(value, torch.device | torch.Tensor | str):
            return value
    return None


def _is_device(where: Any) -> bool:
    return not torch.is_tensor(where) and torch.device(where) == DEVICE
