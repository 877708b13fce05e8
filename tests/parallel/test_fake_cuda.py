"""The forward passes of training and sampling on tensors that say they are on CUDA, where torch knows CUDA at all.

A fake tensor has a shape and a device and no values: what asks for a value on the host, or multiplies a tensor of the
host with one of the device, raises here as it would wait or fail there. A CPU build of torch cannot make such tensors;
`tests/host_waits.py` is what it has instead.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from llada_megatron.parallel import device

device.install()

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.model.attention import flex  # noqa: E402
from llada_megatron.llada_moe.model.head import Targets  # noqa: E402
from llada_megatron.llada_moe.objectives import make_objective  # noqa: E402
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, NoCache  # noqa: E402
from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup  # noqa: E402
from llada_megatron.llada_moe.sampling.schedules import Threshold  # noqa: E402
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor  # noqa: E402
from llada_megatron.llada_moe.sampling.token_buffer import continuation  # noqa: E402
from llada_megatron.parallel import build, topology  # noqa: E402
from llada_megatron.parallel.sampling.stage import StageRunner  # noqa: E402
from llada_megatron.tools.bench.layouts import MODELS, parity_run  # noqa: E402
from llada_megatron.tools.bench.parity import SyntheticData  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(),
    reason="needs a CUDA build of torch, and no GPU (where there is one, the real passes run)",
)
GRID = 5


class FakeDevice(FakeTensorMode):
    """Tensors of the device are fake; those of the host are real, and so is what is computed from them alone."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        named = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not (on_device or named):
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._without_values, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _without_values(self, leaf):
        return self.from_tensor(leaf) if torch.is_tensor(leaf) and not isinstance(leaf, FakeTensor) else leaf


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(device, "_device", "cuda")
    with FakeDevice():
        yield


def chunk_of(run):
    config = build.transformer_config(run.model, run.layout, run.training)
    with torch.device("cuda"):
        [chunk] = build.build_chunks(run.model, run.layout, config, make_objective(run.objective).pattern(0), 1)
    assert {parameter.device.type for parameter in chunk.parameters()} == {"cuda"}
    return chunk


@pytest.mark.parametrize(("block_size", "precision"), [(None, "bf16"), (1, "bf16"), (GRID, "fp32"), (GRID, "bf16")])
def test_the_loss_of_packed_documents_asks_the_device_for_nothing(fake_cuda, monkeypatch, block_size, precision):
    """In one call (bf16), and document by document."""
    # torch's FlexAttention begins with its compiler, which takes no such tensors; all before it is ours, and runs
    monkeypatch.setattr(flex, "_operation", lambda _: lambda q, k, v, block_mask, **_named: q * block_mask.numel())
    run = parity_run(MODELS["dense"], LayoutConfig(), block_size=block_size, precision=precision)
    batch = SyntheticData(run).batch([1, 2])  # two and three documents
    targets = Targets.of(batch.labels, batch.weights).to(device.current())
    chunk = chunk_of(run)
    for elements in (1, chunk.logits_chunk_elements):  # in chunks, and at once
        chunk.logits_chunk_elements = elements
        losses = chunk(batch.inputs.to(device.current()), batch.boundaries, targets=targets)
        assert isinstance(losses, FakeTensor) and losses.device.type == "cuda" and losses.shape == (2,)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("model", ["dense", "softmax", "sigmoid"])
def test_a_sampling_pass_asks_the_device_for_nothing(fake_cuda, model, cached):
    run = parity_run(MODELS[model], LayoutConfig(), block_size=GRID if cached else None, precision="bf16")
    processor = LogitsProcessor(frozenset({"entropy", "current", "divergence"}), excluded=(3,), temperature=1.0)
    cache = BlockCausalCache() if cached else NoCache()
    method = Method(Threshold(0.5), cache, logits_processor=processor, grid=GRID if cached else None)
    group = SequenceGroup(method, 2, 32, 8, run.model.mask_token_id)
    for slot, length in enumerate((7, 12)):
        group.admit(slot, continuation(list(range(length)), 10, GRID, slot, method.grid))
    runner = StageRunner(chunk_of(run).eval(), method, 2, 32)
    work = group.plan()
    for _ in range(2):  # the second pass finds the first one's rows, and its keys
        logits = runner.forward(work)
        assert isinstance(logits, FakeTensor) and logits.shape == (work.offsets.numel(), run.model.vocab_size)
        assert runner.read(work, logits).token.shape == (work.offsets.numel(),)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
    ],
    ids=["item", "tolist", "nonzero", "mask", "host tensor"],
)
def test_what_asks_the_device_raises(fake_cuda, wrong):
    x = torch.zeros(3).to(device.current(), non_blocking=True)
    assert (x * 2.0 + 1).device.type == "cuda"
    assert torch.ones(3).nonzero().tolist() == [[0], [1], [2]]  # on the host
    with pytest.raises(Exception, match="aten|fake tensor|FakeTensor|data dependent|same device"):
        wrong(x)
