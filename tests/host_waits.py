"""Where the host would wait for a GPU, found on a CPU: a run whose tensors are told apart into host and device.

All values are computed as usual. A tensor is the device's if it was created with a device or copied to one by name, or
computed from such a tensor; parameters, buffers and gradient buffers are given. Whatever brings a value of such a
tensor to the host (`item`, `tolist`, `bool`, `numpy`, `nonzero`, indexing by a mask, …), or copies a tensor of the host
to the device and waits for it, is recorded with the place that did it. So are Megatron's own calls of `synchronize`.
Experts are computed as on a GPU without Transformer Engine: in grouped products.

`FakeTensorMode` finds less (no copy), and stops at the first one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_megatron.parallel import device

device.install()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402

from llada_megatron.llada_moe.model import grouped  # noqa: E402

_grouped_product = grouped.grouped_product

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"}
VALUES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "_local_scalar_dense",
          "is_nonzero", "bincount"}  # fmt: skip
"""Operators whose result's shape, or whose Python value, depends on the values of a tensor."""
COPIES = {"tensor", "as_tensor", "new_tensor", "to", "cuda"}
_OWN = (str(Path(torch.__file__).parent), __file__, str(Path(mock.__file__)), str(Path(device.__file__)))


@dataclass(frozen=True, order=True)
class Wait:
    """One place at which the host waits."""

    file: str
    """From the package's folder on, e.g. `llada_megatron/llada_moe/model/head.py`."""
    function: str
    what: str


class HostWaits:
    """Records what happens inside the `with` block; `waits` counts it, `lines` says the line numbers."""

    def __init__(self, models: Iterable[torch.nn.Module] = ()) -> None:
        self.waits: Counter[Wait] = Counter()
        self.lines: dict[Wait, set[int]] = {}
        self._device: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage takes its address
        self._paused = False
        for model in models:
            kept = [value for module in model.modules() for value in (vars(module) | module._buffers).values()]
            self.mark(*model.parameters(), *filter(torch.is_tensor, kept))
            self.mark(*(p.main_grad for p in model.parameters() if hasattr(p, "main_grad")))

    def mark(self, *tensors: torch.Tensor) -> None:
        """These tensors are the device's."""
        if self._paused:
            return
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._device[storage._cdata] = storage

    def marked(self, value: Any) -> bool:
        """Whether it is a tensor of the device."""
        return torch.is_tensor(value) and value.untyped_storage()._cdata in self._device

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing, and leave results to the host: the call inside is part of one that was recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def record(self, what: str) -> None:
        """A wait, at the innermost frame that is neither torch's nor ours."""
        if self._paused:
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(_OWN):
            frame = frame.f_back
        assert frame is not None
        file = Path(frame.f_code.co_filename)
        parts = file.parts
        roots = [i for i, part in enumerate(parts) if part in ("megatron", "llada_megatron")]
        wait = Wait("/".join(parts[roots[-1] if roots else -1 :]), frame.f_code.co_qualname, what)
        self.waits[wait] += 1
        self.lines.setdefault(wait, set()).add(frame.f_lineno)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        stand_in = sys.modules["megatron.core.pipeline_parallel.p2p_communication"].torch.cuda
        synchronize = mock.Mock(side_effect=lambda *_: self.record("torch.cuda.synchronize"))
        self._stack.enter_context(mock.patch.object(stand_in, "synchronize", synchronize))
        event = mock.Mock(side_effect=lambda: self.record("Event.synchronize"))
        self._stack.enter_context(mock.patch.object(device._Nothing, "synchronize", event, create=True))
        self._stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", self._moved))
        self._stack.enter_context(grouped.everywhere())
        self._stack.enter_context(mock.patch.object(grouped, "grouped_product", self._one_call))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Calls(self))
        return self

    def _moved(self, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """What the dispatcher copies to the host on a stream of its own; it waits for the stream's event."""
        with self.paused():
            moved = tensor.cpu() if torch.is_tensor(tensor) else tensor
            return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    def _one_call(self, *arguments: torch.Tensor) -> torch.Tensor:
        """On a GPU a grouped product is one call of torch; here it is made of products whose sizes are read."""
        with self.paused():
            product = _grouped_product(*arguments)
        self.mark(product)
        return product

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __str__(self) -> str:
        return "\n".join(
            f"{count:4} x {wait.what} at {wait.file}:{','.join(map(str, sorted(self.lines[wait])))} in {wait.function}"
            for wait, count in sorted(self.waits.items())
        )


class _Operators(TorchDispatchMode):
    """What operators compute from tensors of the device is the device's."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        on_device = any(map(self._waits.marked, given))
        name = func.overloadpacket.__name__
        if on_device and (name in VALUES or _by_mask(name, args) or _repeats(name, args, kwargs)):
            self._waits.record(name)
        out = func(*args, **kwargs)
        if on_device:
            self._waits.mark(*(leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)))
            if func.namespace == "c10d":  # fills the tensors it is given
                self._waits.mark(*given)
        return out


def _by_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask: its places are counted first (a mask that one number is written to is a fill)."""
    if name not in ("index", "index_put_", "index_put", "_index_put_impl_"):
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (name != "index" and len(args[1]) == 1 and args[2].numel() == 1)


def _repeats(name: str, args: Any, kwargs: Any) -> bool:
    return name == "repeat_interleave" and torch.is_tensor(args[-1]) and kwargs.get("output_size") is None


class _Calls(TorchFunctionMode):
    """Calls that name a device, and those that read a tensor."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "type_name":  # `device` answers for Tensor.type, and is asked a second time by this call
            return func(*args, **kwargs).replace("torch.cuda.", "torch.")
        subject = args[0] if args else None
        if name in READS and self._waits.marked(subject):
            self._waits.record(name)
            with self._waits.paused():
                out = func(*args, **kwargs)
                return out.clone() if torch.is_tensor(out) else out  # on the host from here
        listed = () if torch.is_tensor(subject) else tree_leaves(subject)
        if name in ("tensor", "as_tensor") and any(map(self._waits.marked, listed)):
            self._waits.record(f"{name}(of tensors)")
        named = kwargs.get("device") is not None or (name == "to" and _names_device(args[1:]))
        if not named and name != "cuda":
            return func(*args, **kwargs)
        if name in COPIES and not self._waits.marked(subject) and not kwargs.get("non_blocking"):
            self._waits.record(f"{name}(device)")
        out = func(*args, **kwargs)
        if torch.is_tensor(subject) and not self._waits.marked(subject) and _same_memory(out, subject):
            out = out.clone()
        if torch.is_tensor(out):
            self._waits.mark(out)
        return out


def _names_device(arguments: Any) -> bool:
    return any(isinstance(argument, torch.device) for argument in arguments)


def _same_memory(one: Any, other: torch.Tensor) -> bool:
    return torch.is_tensor(one) and one.untyped_storage()._cdata == other.untyped_storage()._cdata
