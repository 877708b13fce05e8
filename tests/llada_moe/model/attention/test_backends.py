"""Which backend is chosen and why; that a batch's documents are packed once; what the backward pass writes."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.model.attention import (
    backends,
    engine_attention,
    flex,
    packed_documents,
    packed_keys,
    per_document,
    varlen,
)
from llada_megatron.llada_moe.model.attention.backends import Backend, attention_backend
from llada_megatron.llada_moe.model.attention.packed_documents import PackedBatches, pack
from llada_megatron.llada_moe.model.context_slices import Run
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern, segments
from llada_megatron.llada_moe.model.transformer import build_model
from llada_megatron.parallel import device
from llada_megatron.parallel.build import transformer_config
from llada_megatron.tools.bench.attention import attention_module, document_boundaries
from llada_megatron.tools.bench.measurement import single_process, written_bytes
from tests.host_waits import HostWaits
from tests.llada_moe.model.attention.naive import Case, DoubledCase

BLOCKS, DOUBLED = AttentionPattern(32), AttentionPattern(32, doubled=True)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def newest_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The arguments of torch's function."""


@pytest.fixture(autouse=True)
def forgotten():
    attention_backend.cache_clear()
    backends.told.cache_clear()
    yield
    attention_backend.cache_clear()


@pytest.fixture
def everything(monkeypatch):
    """A machine with all that some backend asks for."""
    monkeypatch.setattr(varlen, "operation", lambda: print)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(backends, "_against_building", lambda: None)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("pattern", "dtype", "given", "backend", "reason"),
    [
        (FULL, BF16, {"engine": True}, Backend.ENGINE, "serves this pattern"),
        (CAUSAL, BF16, {"engine": True}, Backend.ENGINE, "serves this pattern"),
        (CAUSAL, BF16, {"engine": True, "split": True}, Backend.VARLEN, "split over context ranks"),
        (FULL, BF16, {}, Backend.VARLEN, "not built from Transformer Engine"),
        (FULL, BF16, {"head_dim": 512}, Backend.FLEX, "varlen takes heads of up to 256 features here, not 512"),
        (FULL, BF16, {"engine": True, "head_dim": 256}, Backend.ENGINE, "serves this pattern"),
        (FULL, BF16, {"engine": True, "head_dim": 264}, Backend.FLEX, "documents takes heads of up to 256 features"),
        (FULL, BF16, {"engine": True, "head_dim": 20}, Backend.FLEX, "documents takes heads of a multiple of 8"),
        (BLOCKS, BF16, {"engine": True}, Backend.FLEX, "no mask of causal blocks"),
        (FULL, BF16, {"head_dim": 20}, Backend.FLEX, "a multiple of 8 features, not 20"),
        (BLOCKS, BF16, {"head_dim": 8}, Backend.PER_DOCUMENT, "heads of 16 features or more, not 8"),
        (FULL, FP32, {"engine": True}, Backend.PER_DOCUMENT, "bfloat16 and float16, not float32"),
    ],
)
def test_the_backend_on_a_gpu_and_its_reason(everything, pattern, dtype, given, backend, reason):
    chosen = attention_backend(pattern, "cuda", dtype, **given)
    assert chosen.backend is backend and reason in chosen.reason


@pytest.mark.parametrize("pattern", [FULL, BLOCKS])
def test_what_is_missing_is_named_and_the_next_one_serves(everything, monkeypatch, pattern):
    monkeypatch.setattr(varlen, "operation", lambda: None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    chosen = attention_backend(pattern, "cuda", BF16)
    assert chosen.backend is Backend.PER_DOCUMENT and "Triton, which is not installed" in chosen.reason
    assert ("2.10 and later have" if pattern is FULL else "varlen has no mask of causal blocks") in chosen.reason


@pytest.mark.parametrize(
    ("capability", "pattern", "dtype", "head_dim", "backend", "reason"),
    [
        ((8, 0), FULL, BF16, 128, Backend.VARLEN, "documents needs compute capability 9.0; this GPU has 8.0"),
        ((8, 0), BLOCKS, BF16, 128, Backend.FLEX, "no mask of causal blocks"),
        ((7, 5), FULL, BF16, 128, Backend.PER_DOCUMENT, "FlexAttention in bfloat16 needs compute capability 8.0"),
        ((7, 5), DOUBLED, BF16, 128, Backend.DECOMPOSED, "FlexAttention in bfloat16 needs compute capability 8.0"),
        ((7, 5), FULL, FP16, 128, Backend.FLEX, "varlen needs compute capability 8.0; this GPU has 7.5"),
        ((6, 1), FULL, FP16, 128, Backend.PER_DOCUMENT, "FlexAttention needs compute capability 7.0"),
        ((10, 0), FULL, BF16, 128, Backend.ENGINE, "serves this pattern"),
        ((10, 0), FULL, BF16, 256, Backend.VARLEN, "documents takes heads of up to 128 features here, not 256"),
    ],
)
def test_what_an_older_or_newer_gpu_has(everything, monkeypatch, capability, pattern, dtype, head_dim, backend, reason):
    """With Transformer Engine."""
    monkeypatch.setattr(backends, "_capability", lambda: capability)
    chosen = attention_backend(pattern, "cuda", dtype, head_dim=head_dim, engine=True)
    assert chosen.backend is backend and reason in chosen.reason


@pytest.mark.parametrize(
    ("named", "programs", "headers", "reason"),
    [
        (None, {"gcc"}, True, None),
        (None, {"clang"}, True, None),
        ("mycc", {"mycc"}, True, None),
        (None, {"cc", "mycc"}, True, "needs a C compiler: neither gcc nor clang is on PATH"),
        ("mycc", {"gcc"}, True, "needs a C compiler: CC names 'mycc', which is no program"),
        (None, {"gcc"}, False, "needs the headers of Python: there is no "),
    ],
)
def test_triton_needs_a_compiler_and_headers(monkeypatch, tmp_path, named, programs, headers, reason):
    monkeypatch.setattr(varlen, "operation", lambda: None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(backends.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(backends.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    if headers:
        (tmp_path / "Python.h").touch()
    chosen = attention_backend(BLOCKS, "cuda", BF16)
    assert chosen.backend is (Backend.PER_DOCUMENT if reason else Backend.FLEX) and (reason or "") in chosen.reason


def test_a_cpu_computes_document_by_document():
    for pattern in (FULL, CAUSAL, BLOCKS):
        assert attention_backend(pattern, "cpu", FP32).backend is Backend.PER_DOCUMENT


def test_the_log_says_a_choice_once(caplog):
    module, boundaries = attention_module(heads=1, head_dim=8, pattern=FULL), document_boundaries(16, 2)
    tensors = [torch.randn(16, 1, 1, 8) for _ in range(3)]
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        module(*tensors, boundaries)
        module(*tensors, boundaries)
    assert [record.message for record in caplog.records] == [
        "attention: scaled_dot_product_attention, document by document (kernels for packed documents need CUDA)"
    ]


def test_cudnn_is_not_taken_for_attention_on_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "_installed", False)
    monkeypatch.setattr(device, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    monkeypatch.setattr(device.torch_adam, "patch_resume", lambda: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        device.install()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("pattern", [FULL, CAUSAL, AttentionPattern(8)])
def test_what_the_backward_pass_writes_does_not_grow_with_the_documents(pattern):
    module = attention_module(heads=1, head_dim=8, pattern=pattern)

    def written(documents: int) -> int:
        tensors = [torch.randn(4096, 1, 1, 8, requires_grad=True) for _ in range(3)]
        out = module(*tensors, document_boundaries(4096, documents))
        return written_bytes(lambda: out.backward(torch.ones_like(out)))

    one = written(1)
    assert one >= 3 * 4096 * 8 * 4
    assert written(512) <= 1.2 * one


@pytest.mark.parametrize("pattern", [FULL, AttentionPattern(8)])
def test_nor_does_it_on_a_context_rank(pattern):
    """The second half of the queries, with the keys of the whole window."""

    def written(documents: int) -> int:
        packed = pack(segments(document_boundaries(4096, documents), 4096), pattern, 4096, [Run(2048, 4096)])
        tensors = [torch.randn(seq, 1, 1, 8, requires_grad=True) for seq in (2048, 4096, 4096)]
        out = per_document.attend(*tensors, packed, None)
        return written_bytes(lambda: out.backward(torch.ones_like(out)))

    assert written(512) <= 1.2 * written(1)


def test_a_band_writes_no_gradient_as_large_as_the_document():
    """16 bands of 256 queries: each writes the gradients of the keys it sees twice, and slices would write 4 times."""
    module = attention_module(heads=1, head_dim=8, pattern=AttentionPattern(32))
    tensors = [torch.randn(4096, 1, 1, 8, requires_grad=True) for _ in range(3)]
    out = module(*tensors, document_boundaries(4096, 1))
    seen = sum(range(256, 4096 + 1, 256))
    assert written_bytes(lambda: out.backward(torch.ones_like(out))) < (2 * 2 * seen + 8 * 4096) * 8 * 4


def test_documents_are_packed_once_for_all_layers_and_again_for_another_batch(monkeypatch):
    fields = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    model = ModelConfig(
        family="llada",
        num_layers=3,
        hidden_size=16,
        ffn_hidden_size=32,
        max_sequence_length=16,
        mask_token_id=63,
        eos_token_id=62,
        **fields,
    )
    counts, made, pack = [], [], packed_documents.pack
    monkeypatch.setattr(packed_documents, "pack", lambda *given: made.append(given) or pack(*given))
    with single_process():
        built = build_model(model, transformer_config(model, LayoutConfig()))
        for documents in (2, 2, 4):
            built(torch.arange(16)[None], document_boundaries(16, documents), rows=torch.ones(1, 16, dtype=torch.bool))
            counts.append(len(made))
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("way", [varlen, engine_attention])
def test_what_a_call_over_all_documents_takes_is_found_once_for_all_layers(monkeypatch, way):
    """The signature of torch's function, the longest document, and which keys are taken."""
    packed, asked = Case(32, ((5, 20, 7), (32,)), 1, 1, 2, 4, 2).packed(), []

    def counted(function):
        return lambda *given: asked.append(function.__name__) or function(*given)

    tensors = [torch.randn(seq, 2, heads, 8) for seq, heads in ((16, 4), (32, 2), (32, 2))]
    called = (None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None)
    monkeypatch.setattr(way, "longest", counted(packed_keys.longest))
    monkeypatch.setattr(packed_keys, "key_parts", counted(packed_keys.key_parts))
    monkeypatch.setattr(varlen.inspect, "signature", counted(varlen.inspect.signature))
    for _ in range(3):
        way.arguments(*tensors, packed, *(called if way is varlen else ()))
    assert sorted(asked) == ["key_parts", "longest", *(["signature"] if way is varlen else [])]


@pytest.mark.parametrize("attend", [per_document.attend, varlen.attend])
@pytest.mark.parametrize("block", [None, 1])
def test_no_value_of_a_tensor_is_asked_for(attend, block):
    """Under FakeTensorMode tensors have no values; torch's own operator checks the arguments of the call as well."""
    packed = Case(32, ((5, 20, 7), (32,)), block, 0, 1, 4, 2).packed()
    with FakeTensorMode():
        tensors = [torch.randn(32, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        out = attend(*tensors, packed, None)
        out.backward(torch.ones_like(out))
    assert out.shape == (32, 2, 32) and all(tensor.grad.shape == tensor.shape for tensor in tensors)


@pytest.mark.parametrize(
    "made",
    [
        lambda q, k, v, packed: flex.block_mask(packed, q.device),
        lambda q, k, v, packed: varlen.arguments(q, k, v, packed, 0.5, newest_varlen),
        lambda q, k, v, packed: engine_attention.arguments(q, k, v, packed),
        lambda q, k, v, packed: per_document.attend(q, k, v, packed, None),
    ],
    ids=["FlexAttention", "varlen", "Transformer Engine", "per document"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_host_waits_for_nothing_that_a_call_is_given(made, ranks):
    packed = Case(32, ((5, 20, 7), (32,)), 1, 0, ranks, 4, 2).packed()
    with HostWaits() as waits:
        q, k, v = (
            torch.randn(n, 2, heads, 8, device=device.current()) for n, heads in ((32 // ranks, 4), (32, 2), (32, 2))
        )
        made(q, k, v, packed)
    assert waits.waits == {}, str(waits)


def test_nor_for_the_tiles_of_doubled_sequences():
    with HostWaits() as waits:
        flex.block_mask(DoubledCase(64, ((5, 20, 7), (32,)), 6, 0, 1, 4, 2).packed(), device.current())
    assert waits.waits == {}, str(waits)


def test_only_the_last_batches_are_kept():
    batches, facts = PackedBatches(kept=2), {"batch": 1, "positions": 16, "runs": (Run(0, 16),)}
    first = batches.of(document_boundaries(16, 2), FULL, **facts)
    assert batches.of(document_boundaries(16, 2), FULL, **facts) is first
    assert batches.of(document_boundaries(16, 2), CAUSAL, **facts) is not first
    assert batches.of(document_boundaries(16, 2), FULL, **facts) is first  # now the newer one of two
    batches.of(None, FULL, **facts)
    assert batches.of(document_boundaries(16, 2), FULL, **facts) is first
    batches.of(document_boundaries(16, 4), FULL, **facts), batches.of(None, FULL, **facts)
    assert batches.of(document_boundaries(16, 2), FULL, **facts) is not first
