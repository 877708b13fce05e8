"""What the tool that finds waits for a GPU takes for one, and what not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llada_megatron.llada_moe.model.transfer import pinned, to_device
from llada_megatron.parallel import device
from tests.host_waits import HostWaits

HOST = torch.device("cpu")

WAITS: dict[str, tuple[Callable, str]] = {
    "tolist": (lambda t: t.dev.tolist(), "tolist"),
    "item": (lambda t: t.dev[0].item(), "item"),
    "bool": (lambda t: bool(t.dev.any()), "__bool__"),
    "float": (lambda t: float(t.dev[1]), "__float__"),
    "numpy": (lambda t: t.dev.numpy(), "numpy"),
    "array": (lambda t: np.asarray(t.dev), "__array__"),
    "print": (lambda t: f"{t.dev!r}", "__repr__"),
    "contains": (lambda t: 3 in t.dev, "_local_scalar_dense"),
    "equal": (lambda t: torch.equal(t.dev, t.dev), "equal"),
    "allclose": (lambda t: torch.allclose(t.dev, t.dev), "allclose"),
    "nonzero": (lambda t: t.dev.nonzero(), "nonzero"),
    "unique": (lambda t: t.dev.unique(), "_unique2"),
    "repeat": (lambda t: t.dev.repeat_interleave(t.dev.long()), "repeat_interleave"),
    "mask": (lambda t: t.dev[t.dev > 0], "index"),
    "written mask": (lambda t: t.dev.__setitem__(t.dev > 1, t.dev[:2] * 2), "index_put_"),
    "device's number at a mask": (lambda t: t.dev.__setitem__(t.dev > 1, t.dev[0]), "index_put_"),
    "list as index": (lambda t: t.dev[[0, 1]], "index(host index)"),
    "host index": (lambda t: t.dev[t.index], "index(host index)"),
    "host mask": (lambda t: t.dev[t.host > 0], "index(host index)"),
    "written host index": (lambda t: t.dev.__setitem__(t.index, t.dev[:2] * 2), "index_put_(host index)"),
    "number at an index": (lambda t: t.dev.__setitem__(t.dev.long(), 0.5), "index_put_(host value)"),
    "number at a place": (lambda t: t.dev.__setitem__(1, 0.5), "copy_(device)"),
    "cpu": (lambda t: t.dev.cpu(), "cpu"),
    'to("cpu")': (lambda t: t.dev.to("cpu"), "to(host)"),
    "to(device of the host)": (lambda t: t.dev.to(HOST, torch.float64), "to(host)"),
    "to(device=)": (lambda t: t.dev.to(device="cpu"), "to(host)"),
    "to(host tensor)": (lambda t: t.dev.to(t.host), "to(host)"),
    "host.copy_": (lambda t: t.host.copy_(t.dev), "copy_(host)"),
    "host.copy_, not pinned": (lambda t: t.host.copy_(t.dev, non_blocking=True), "copy_(host, not pinned)"),
    "dev.copy_": (lambda t: t.dev.copy_(t.host), "copy_(device)"),
    "dev.copy_ of pinned": (lambda t: t.dev.copy_(pinned(t.host)), "copy_(device)"),
    "dev.copy_, not pinned": (lambda t: t.dev.copy_(t.host, non_blocking=True), "copy_(device, not pinned)"),
    "to device": (lambda t: t.host.to(device.current()), "to(device)"),
    "to device of another": (lambda t: t.host.to(t.dev.device), "to(device)"),
    "to device, pinned": (lambda t: pinned(t.host).to(t.dev), "to(device)"),
    "to device, not pinned": (lambda t: t.host.to(t.dev, non_blocking=True), "to(device, not pinned)"),
    "tensor": (lambda t: torch.tensor(3, device=device.current()), "tensor(device)"),
    "as_tensor": (lambda t: torch.as_tensor([3], device=t.dev.device), "as_tensor(device)"),
    "as_tensor to the host": (lambda t: torch.as_tensor(t.dev, device="cpu"), "as_tensor(host)"),
    "new_tensor": (lambda t: t.dev.new_tensor([1, 2]), "new_tensor(device)"),
    "tensor of tensors": (lambda t: torch.tensor([t.dev[0]]), "tensor(of tensors)"),
    "synchronize": (lambda t: torch.cuda.synchronize(), "torch.cuda.synchronize"),
}
NO_WAITS: dict[str, Callable] = {
    "host": lambda t: (t.host.tolist(), t.index.nonzero(), t.host[t.host > 1], t.host.to("cpu"), f"{t.host}"),
    "computed": lambda t: (t.dev * 2 + t.host[0]).sum(),
    "copies of pinned": lambda t: (to_device(t.host, t.dev.device), t.dev.copy_(pinned(t.host), non_blocking=True)),
    "to the host later": lambda t: t.dev.to("cpu", non_blocking=True),
    "dtype": lambda t: t.dev.to(torch.float64),
    "on the device": lambda t: (t.dev.to(t.dev.device), t.dev.copy_(t.dev * 2), torch.zeros(3, device=t.dev.device)),
    "index": lambda t: (t.dev[to_device(t.index, t.dev.device)], t.dev[1], t.dev[1:3], t.dev[None, :]),
    "fill": lambda t: (t.dev.__setitem__(t.dev > 1, 0.5), t.dev.__setitem__(slice(2), 0.5), t.dev.fill_(0.0)),
    "empty": lambda t: t.host[:0].to(t.dev.device),
    "number": lambda t: torch.full((), 3, device=t.dev.device),
    "alike on the host": lambda t: torch.zeros_like(t.dev, device="cpu").tolist(),
}  # fmt: skip


@pytest.fixture
def waits():
    return HostWaits()


@pytest.fixture
def tensors(waits):
    dev = torch.arange(4.0)
    waits.mark(dev)
    return SimpleNamespace(dev=dev, host=torch.arange(4.0), index=torch.tensor([0, 2]))


@pytest.mark.parametrize("kind", WAITS)
def test_each_kind_of_wait_is_found_once_where_it_is(waits, tensors, kind):
    call, what = WAITS[kind]
    with waits:
        call(tensors)
    [(wait, count)] = waits.waits.items()
    assert (wait.what, wait.file, count) == (what, "test_host_waits.py", 1)


@pytest.mark.parametrize("kind", NO_WAITS)
def test_what_is_none(waits, tensors, kind):
    with waits:
        NO_WAITS[kind](tensors)
    assert waits.waits == {}, str(waits)


def test_what_is_the_devices(waits, tensors):
    """What is computed from its tensors, forwards and backwards; not what was read."""
    with waits:
        inputs = tensors.dev.detach().requires_grad_()
        (inputs * 2).square().sum().backward()
        ours = [
            inputs.grad,
            torch.ones(2, device=device.current()),
            torch.ones_like(tensors.dev),
            tensors.dev.new_zeros(1),
        ]
        read = [tensors.dev.to("cpu"), tensors.dev.cpu() + 1, tensors.dev.new_zeros(1, device="cpu"), tensors.host]
        assert (
            all(map(waits.marked, ours))
            and all(tensor.is_cuda for tensor in ours)
            and {tensor.device for tensor in ours} == {device.current()}
        )
        assert not any(map(waits.marked, read)) and {tensor.device for tensor in read} == {HOST}
    assert torch.equal(inputs.grad, 8 * torch.arange(4.0))


def test_every_tensor_that_is_read_in_a_list_is_counted(waits, tensors):
    with waits:
        assert torch.tensor([tensors.dev[0], tensors.dev[2]]).tolist() == [0.0, 2.0]
    assert list(waits.waits.values()) == [2]


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.tolist()[0] + torch.ones(4, device=gradient.device)


@pytest.mark.parametrize("backward", [lambda x: x.backward(), torch.autograd.backward], ids=["Tensor", "autograd"])
def test_the_backward_pass_is_seen_too(waits, tensors, backward):
    inputs = tensors.dev.requires_grad_()
    with waits:
        backward(ReadsInBackward.apply(inputs).sum())
        assert waits.marked(inputs.grad)
    assert {(wait.what, wait.function): count for wait, count in waits.waits.items()} == {
        ("tolist", "ReadsInBackward.backward"): 1
    }
