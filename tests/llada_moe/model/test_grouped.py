"""Experts in grouped products: values, gradients and memory of the experts one by one, without the host's counts."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llada_megatron.parallel import device

device.install()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup  # noqa: E402
from megatron.core.transformer.moe.moe_utils import permute  # noqa: E402

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.model import compiled, grouped  # noqa: E402
from llada_megatron.llada_moe.model.experts import PermutedExperts, expert_weights  # noqa: E402
from llada_megatron.llada_moe.model.layer import by_expert  # noqa: E402
from llada_megatron.llada_moe.model.transformer import build_model  # noqa: E402
from llada_megatron.parallel.build import add_to_main_gradients, transformer_config  # noqa: E402
from tests.llada_moe.model.test_experts import MODEL, make, one_rank, outcome  # noqa: E402, F401

COUNTS = [[3, 5, 1, 7], [0, 9, 0, 2], [4, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_equals_the_experts_one_by_one(counts, dtype, tolerance):
    theirs = outcome(make(PermutedExperts), counts, dtype)
    with grouped.everywhere():
        ours = outcome(make(PermutedExperts), counts, dtype)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = float(value.float().abs().max()) if value.numel() else 1.0
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(ours[name], value, atol=tolerance * max(scale, 1e-6), rtol=0)


@pytest.mark.parametrize("counts", COUNTS)
def test_torchs_grouped_product_is_the_product_of_each_group(monkeypatch, counts):
    """What runs on a GPU, where this torch has it for the CPU as well: bfloat16, also of groups without rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 32, generator=generator).bfloat16()
    weights = torch.randn(4, 16, 32, generator=generator).bfloat16()
    dy = torch.randn(sum(counts), 16, generator=generator).bfloat16()
    ends = grouped.ends_of(torch.tensor(counts), x.device)
    cases = [(x, weights.transpose(1, 2)), (dy, weights), (dy.t(), x)]
    in_one_call = [grouped.grouped_product(a, b, ends) for a, b in cases]
    assert grouped.GROUPED_MM is not None
    monkeypatch.setattr(grouped, "GROUPED_MM", None)
    for got, (a, b) in zip(in_one_call, cases, strict=True):
        torch.testing.assert_close(got, grouped.grouped_product(a, b, ends), atol=0.1, rtol=2e-2)


def test_a_group_without_rows_has_a_product_of_zero_whatever_the_kernel_leaves_there(monkeypatch):
    def kernel(a, b, *, offs):
        product = torch.full((offs.numel(), a.size(0), b.size(1)), float("nan"), dtype=a.dtype)
        product[1] = a @ b
        return product

    monkeypatch.setattr(grouped, "GROUPED_MM", kernel)
    a, b = torch.randn(8, 5).bfloat16(), torch.randn(5, 16).bfloat16()
    product = grouped.grouped_product(a, b, torch.tensor([0, 5, 5], dtype=torch.int32))
    assert torch.equal(product[1], a @ b) and not product[0].any() and not product[2].any()


def test_a_gpu_would_be_given_what_its_grouped_product_takes():
    """Shapes, strides and types of the three products in both directions, by torch's own checks for the meta device."""
    weights = [
        torch.nn.Parameter(torch.empty(4, *shape, dtype=torch.bfloat16, device="meta"))
        for shape in ((48, 32), (32, 24))
    ]
    first, second = ([part.detach()[i].requires_grad_() for i in range(4)] for part in weights)
    x = torch.empty(11, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    probs = torch.empty(11, device="meta", requires_grad=True)
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    y = grouped.GroupedExperts.apply(x, probs, ends, None, *first, *second)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and first[0].grad.shape == (48, 32) and second[3].grad.shape == (32, 24)


def evaluation_layer(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformer_config(MODEL, LayoutConfig())
    config.params_dtype = dtype
    layer = build_model(MODEL, config).decoder.layers[0].mlp.eval()
    return layer, torch.randn(7, 2, MODEL.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_a_pass_equals_the_experts_one_by_one():
    layer, x = evaluation_layer()
    with torch.inference_mode():
        one_by_one = layer(x)[0]
        with grouped.everywhere():
            at_once = layer(x)[0]
    torch.testing.assert_close(at_once, one_by_one, atol=1e-6 * float(one_by_one.abs().max()), rtol=0)


def test_a_pass_waits_for_nothing():
    """`FakeTensorMode` refuses every value that the host would have to read."""
    with FakeTensorMode(), grouped.everywhere(), torch.no_grad():
        layer, x = evaluation_layer(torch.bfloat16)
        assert layer(x)[0].shape == x.shape


def test_parameters_are_one_tensor_in_memory_and_again_in_megatrons_buffer():
    experts = make(PermutedExperts)
    assert not shares_memory(experts)
    for weights in expert_weights(experts):
        grouped.lay_out(weights)
    assert shares_memory(experts)
    experts.local_experts = grouped.RegisteredBackwards(list(experts.local_experts))
    assert next(name for name, _ in experts.named_parameters()).startswith("local_experts.3.")
    assert [expert for expert in experts.local_experts] == [experts.local_experts[i] for i in range(4)]
    before = [weight.detach().clone() for part in expert_weights(experts) for weight in part]
    reduction = DistributedDataParallelConfig(use_distributed_optimizer=True)
    DistributedDataParallel(experts.config, reduction, experts)
    assert shares_memory(experts)
    stacks = [matrix for part in expert_weights(experts) for matrix in grouped.stacked(part)]
    assert all(torch.equal(a, b) for a, b in zip(stacks, before, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_weight_gradients_are_added_to_megatrons_buffer_at_once(monkeypatch, overlap):
    """As autograd and Megatron's hooks add them, parameter by parameter; a second pass adds to the first. Where hooks
    begin the reduction of what is ready, each parameter is reported once a pass."""
    ready = []
    register = BucketGroup.register_grad_ready
    monkeypatch.setattr(
        BucketGroup, "register_grad_ready", lambda self, p, *rest: ready.append(p) or register(self, p, *rest)
    )

    def gradients(at_once):
        experts = make(PermutedExperts)
        experts.local_experts = grouped.RegisteredBackwards(list(experts.local_experts))
        reduction = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap)
        wrapped = DistributedDataParallel(experts.config, reduction, experts)
        if at_once:
            add_to_main_gradients([experts], awaited=overlap)
            assert experts.main_gradients is not None
            monkeypatch.setattr(torch, "empty_like", lambda like, **keys: torch.full(like.shape, torch.nan, **keys))
        ready.clear()
        for seed in (1, 2):
            x = torch.randn(16, MODEL.hidden_size, generator=torch.Generator().manual_seed(seed))
            with contextlib.nullcontext() if seed == 2 else wrapped.no_sync(), grouped.everywhere():
                wrapped(x, torch.tensor([3, 5, 0, 8]), torch.rand(16))[0].square().sum().backward()
        assert all(parameter.grad is None for parameter in experts.parameters())
        assert len(ready) == overlap * 2 * len(list(experts.parameters()))
        return {name: parameter.main_grad.clone() for name, parameter in experts.named_parameters()}

    torch.manual_seed(0)
    expected = gradients(at_once=False)
    torch.manual_seed(0)
    found = gradients(at_once=True)
    assert max(float(value.abs().max()) for value in expected.values()) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_gradient_is_added_without_what_a_kernel_leaves_for_experts_that_had_no_rows(monkeypatch):
    def kernel(a, b, offs):
        starts = [0, *offs.tolist()[:-1]]
        parts = [a[:, start:end] @ b[start:end] for start, end in zip(starts, offs.tolist(), strict=True)]
        return torch.stack([part if part.any() else torch.full_like(part, float("nan")) for part in parts])

    monkeypatch.setattr(grouped, "GROUPED_MM", kernel)
    dy, x = torch.randn(5, 8).bfloat16(), torch.randn(5, 16).bfloat16()
    main = torch.ones(3, 8, 16)
    grouped._accumulate(main, dy, x, torch.tensor([0, 3, 5], dtype=torch.int32))
    assert torch.equal(main[0], torch.ones(8, 16)), "the first expert had no rows"
    products = torch.stack([dy[:3].t() @ x[:3], dy[3:].t() @ x[3:]]).float()
    torch.testing.assert_close(main[1:], 1 + products)


def test_what_a_gpu_compiles_is_what_a_cpu_computes(monkeypatch):
    """Traced by torch's compiler, and for other numbers of rows not once more; only the kernels are not made."""
    traced = []

    def backend(module, _inputs):
        traced.append(module)
        return module.forward

    real = torch.compile
    monkeypatch.setattr(compiled, "_compiles", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    compiled.for_any_rows.cache_clear()
    try:
        gradients = compiled.for_any_rows(grouped._activation_gradients, "cuda")
        for rows in (7, 12, 31):
            both, probs, d_scaled = torch.randn(rows, 16), torch.rand(rows), torch.randn(rows, 8)
            expected = grouped._activation_gradients(both, probs, d_scaled)
            for found, value in zip(gradients(both, probs, d_scaled), expected, strict=True):
                torch.testing.assert_close(found, value)
        assert len(traced) == 1
        main, product = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
        compiled.for_any_rows(grouped._add_to, "cuda")(main, product, torch.tensor([True, False]))
        assert not main[0].any() and torch.equal(main[1], product[1])
    finally:
        compiled.for_any_rows.cache_clear()


def test_experts_elsewhere_in_memory_are_left_to_autograd():
    experts = make(PermutedExperts)
    for weight in (weight for part in expert_weights(experts) for weight in part):
        weight.main_grad = torch.zeros_like(weight)
    add_to_main_gradients([experts], awaited=False)
    assert experts.main_gradients is None


def test_a_rank_that_holds_all_experts_trains_as_with_the_dispatcher():
    def trained(at_once):
        torch.manual_seed(0)
        layer = build_model(MODEL, transformer_config(MODEL, LayoutConfig())).decoder.layers[0].mlp.train()
        x = torch.randn(7, 2, MODEL.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.moe_layer_recompute = not at_once  # which is left to Megatron
        layer.token_dispatcher.token_dispatch = None if at_once else layer.token_dispatcher.token_dispatch
        with grouped.everywhere():
            out, bias = layer(x)
        assert bias is None
        out.square().sum().backward()
        return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

    expected, found = trained(at_once=False), trained(at_once=True)
    assert found.keys() == expected.keys() and expected["router.weight"].abs().max() > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda said, name=name: f"{name}: {said}")


def test_rows_are_ordered_by_expert_as_megatron_orders_them():
    """Bit by bit, and so are the gradients."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(9, 5, generator=generator)
    chosen = scores.argsort(dim=1) < 2
    found = []
    for ours in (False, True):
        weights, tokens = (scores * chosen).requires_grad_(), scores.exp().requires_grad_()
        if ours:
            order, probs = by_expert(weights, chosen, 2)
            places = order // 2
            rows = tokens.index_select(0, places)
        else:
            rows, probs, places = permute(tokens, chosen, probs=weights, num_out_tokens=18)[:3]
        (rows.square() * probs[:, None]).sum().backward()
        found.append((places, rows, probs, tokens.grad, weights.grad))
    assert all(map(torch.equal, *found))


def test_matrices_in_another_order_are_copied():
    storage = torch.arange(12.0).view(3, 2, 2)
    for order in ([2, 1, 0], [0, 2, 1], [1, 1, 1]):
        assert torch.equal(grouped.stacked([storage[i] for i in order]), storage[order])
    assert grouped.stacked([storage[0], storage[2]]).stride() == (8, 2, 1)
    assert torch.equal(grouped.stacked([storage[1]]), storage[1:2])


def shares_memory(experts) -> bool:
    return all(
        grouped.stacked(part).untyped_storage()._cdata == part[0].untyped_storage()._cdata
        for part in expert_weights(experts)
    )


def test_a_gpu_takes_grouped_products_where_they_fit():
    def usable(dtype, ffn, cuda=True, quantized=False):
        with FakeTensorMode():
            x = torch.empty(3, 32, dtype=dtype)
            first = [torch.nn.Parameter(torch.empty(2 * ffn, 32, dtype=dtype))]
            if quantized:
                first[0].__class__ = type("Float8Tensor", (FakeTensor,), {"__module__": "transformer_engine.pytorch"})
        return grouped.usable(_OnCuda(x) if cuda else x, first)

    assert usable(torch.bfloat16, 24)
    assert not usable(torch.bfloat16, 24, cuda=False)
    assert not usable(torch.bfloat16, 20)
    assert not usable(torch.float32, 24)
    assert not usable(torch.bfloat16, 24, quantized=True)


@pytest.mark.parametrize(("capability", "public", "fits"), [
    ((8, 0), True, False), ((9, 0), True, True), ((9, 0), False, True), ((10, 0), True, True), ((10, 0), False, False)
])  # fmt: skip
def test_a_gpu_without_the_kernel_keeps_its_other_experts(monkeypatch, capability, public, fits):
    grouped._has_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if public:
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped.GROUPED_MM, raising=False)
    else:
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    assert grouped.serves(torch.bfloat16, 24) is fits
    grouped._has_kernel.cache_clear()


class _OnCuda:
    """A tensor that says it is on a GPU."""

    def __init__(self, tensor):
        self.is_cuda, self.dtype = True, tensor.dtype
