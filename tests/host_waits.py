"""Where the host would wait for a GPU, found on a CPU: a run whose tensors are told apart into host and device.

All values are computed as usual. Inside the `with` block `device.current()` is "cpu:0", which torch takes for the CPU
and tells from it. A tensor is the device's if it was made on "cpu:0", copied there, or computed from such a tensor, and
its `device` and `is_cuda` say so. Of what was made before, the parameters, buffers and gradient buffers of given models
are, and what `mark` is told. Recorded, with the place that did it, is

- what brings a value of such a tensor to the host: `item`, `tolist`, `bool`, `nonzero`, indexing by a mask, …;
- a copy to the host, unless it does not block (then somebody waits for an event, which is recorded);
- a copy to the device, also of an index, unless it does not block and begins in pinned memory;
- a call of `synchronize`.

Experts are computed as on a GPU without Transformer Engine, in grouped products; `transfer.pinned` pins by name.

What it cannot see: what runs only where the type of a device is "cuda" (kernels of attention, compiled functions); what
a library does inside (torch's allocator, a kernel that waits by itself, NCCL, Transformer Engine); memory that is read
past torch's operators (`data_ptr`, storages); threads beside the one that entered; waits for other ranks. Tensors of
host and device in one product, which a GPU refuses, pass.

`FakeTensorMode` finds less (no copy), and stops at the first one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self
from unittest import mock

import torch

from llada_megatron.parallel import device

device.install()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402

from llada_megatron.llada_moe.model import grouped, transfer  # noqa: E402
from tests import waiting_calls  # noqa: E402
from tests.waiting_calls import DEVICE, Calls, Operators  # noqa: E402

_grouped_product = grouped.grouped_product
_run_backward = torch.autograd._engine_run_backward

_OWN = (
    str(Path(torch.__file__).parent),
    __file__,
    waiting_calls.__file__,
    str(Path(mock.__file__)),
    str(Path(device.__file__)),
)


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
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._paused = False
        self.called = ""
        """The call of torch that an operator is part of."""
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

    def unmark(self, tensor: torch.Tensor) -> None:
        """This tensor is the host's."""
        self._device.pop(tensor.untyped_storage()._cdata, None)

    def marked(self, value: Any) -> bool:
        """Whether it is a tensor of the device."""
        return torch.is_tensor(value) and value.untyped_storage()._cdata in self._device

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor in memory that counts as pinned."""
        if self.marked(tensor):
            return tensor
        copied = tensor.clone()
        self._pinned[copied.untyped_storage()._cdata] = copied.untyped_storage()
        return copied

    def record_copy(self, what: str, host: torch.Tensor, down: bool, non_blocking: bool) -> None:
        """A copy between the device and `host`, `down` to it or up from it, if it is waited for."""
        pinned = host.untyped_storage()._cdata in self._pinned
        if host.numel() and not (non_blocking and pinned):
            self.record(f"{what}({'host' if down else 'device'}{', not pinned' if non_blocking else ''})")

    def forget(self) -> None:
        """Begin to count anew."""
        self.waits.clear()
        self.lines.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing, and leave results to the host: the call inside is part of one that was recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def record(self, what: str, times: int = 1) -> None:
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
        self.waits[wait] += times
        self.lines.setdefault(wait, set()).add(frame.f_lineno)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        stand_in = sys.modules["megatron.core.pipeline_parallel.p2p_communication"].torch.cuda
        synchronize = mock.Mock(side_effect=lambda *_: self.record("torch.cuda.synchronize"))
        event = mock.Mock(side_effect=lambda: self.record("Event.synchronize"))
        with_cuda = device._Overlay(torch, cuda=device._Overlay(torch.cuda, is_available=lambda: True))
        for owner, name, replaced in (
            (device, "_device", str(DEVICE)),
            (stand_in, "synchronize", synchronize),
            (torch.cuda, "synchronize", synchronize),
            (token_dispatcher, "maybe_move_tensor_to_cpu", self._moved),
            (grouped, "grouped_product", self._one_call),
            (transfer, "torch", with_cuda),
            (torch.autograd, "_engine_run_backward", self._backwards),
            (torch.Tensor, "pin_memory", lambda tensor, *_: self.pin(tensor)),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, replaced))
        self._stack.enter_context(mock.patch.object(device._Nothing, "synchronize", event, create=True))
        self._stack.enter_context(grouped.everywhere())
        self._stack.enter_context(Operators(self))
        self._stack.enter_context(Calls(self))
        return self

    def _moved(self, tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """What the dispatcher copies to the host on a stream of its own; it waits for the stream's event."""
        with self.paused():
            moved = self.pin(tensor.cpu()) if torch.is_tensor(tensor) else tensor
            return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    def _backwards(self, *arguments: Any, **named: Any) -> Any:
        """torch leaves out modes of calls from inside of `backward`, which is such a call."""
        with Calls(self):
            return _run_backward(*arguments, **named)

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
