"""What is measured: as many layers as fit, documents that fill their windows, kernels told apart, peaks by name."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from llada_megatron.llada_moe.config.fp8 import check_fp8
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.tools.bench.gpu import fp8_loss, precisions, workloads
from llada_megatron.tools.bench.gpu.attention_speed import dense_mask
from llada_megatron.tools.bench.gpu.kernel_profile import host_waits, kind_of
from llada_megatron.tools.bench.gpu.machine_figures import named_peak
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.workloads import document_boundaries, needed_bytes, workload

H100, H200 = 85_000_000_000, 150_000_000_000


def test_more_layers_fit_into_more_memory_and_one_more_would_not():
    for make in (workloads.moe, workloads.mini):
        small, large = make(H100).run, make(H200).run
        assert 2 <= small.model.num_layers < large.model.num_layers
        more = dataclasses.replace(small.model, num_layers=small.model.num_layers + 1)
        assert needed_bytes(small) <= 0.82 * H100 < needed_bytes(dataclasses.replace(small, model=more))
    assert needed_bytes(workloads.dense(toy=False).run) < 0.82 * H100


def test_a_gpu_that_is_too_small_is_told():
    with pytest.raises(ResourceError, match="two layers of llada_moe need more than this GPU's 16 GB"):
        workloads.moe(16_000_000_000)


def test_an_h100_with_transformer_engine_has_three_recipes_and_every_model_has_widths_for_them(monkeypatch):
    assert precisions.precisions(Machine("a CPU", 0, 0, "2.11.0")) == [precisions.BF16]
    monkeypatch.setattr(precisions, "transformer_engine_active", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first, *fp8 = precisions.precisions(Machine("NVIDIA H100", H100, 90, "2.11.0"))
    assert first == precisions.BF16 and {each.name for each in fp8} == {
        "FP8 delayed",
        "FP8 tensorwise",
        "FP8 blockwise",
    }
    for each in fp8:
        runs = [make(H100, **each.training).run for make in (workloads.moe, workloads.mini)]
        runs += [workloads.dense(False, **each.training).run, fp8_loss.training_run(False, each.training)]
        for run in runs:
            check_fp8(run.training, run.model, run.layout, lambda key, said: pytest.fail(f"{key}: {said}"))


@pytest.mark.parametrize("documents", [1, 8, 40])
def test_windows_are_cut_into_as_many_documents(documents):
    found = document_boundaries(2, 64, documents, seed=3)
    assert found.dtype == torch.int32 and len(found) == 2 * documents + 1
    assert found[0] == 0 and found[documents] == 64 and found[-1] == 128 and (found.diff() > 0).all()


def test_the_operations_of_a_step_count_the_pairs_inside_documents_only():
    work = workload(workloads.DENSE, 64, 1, 2)
    batch = work.batch(4)
    lengths = batch.boundaries.diff().double()
    seen = float((lengths**2).sum() / lengths.sum())
    layers, width = workloads.DENSE.num_layers, workloads.DENSE.num_attention_heads * workloads.DENSE.head_dim
    whole = work.flops(work.batch(1))
    assert whole - work.flops(batch) == pytest.approx(work.tokens * 12 * layers * (64 - seen) * width)


def test_the_dense_mask_is_that_of_documents_and_blocks():
    seen = dense_mask(torch.tensor([0, 3, 8]), 8, AttentionPattern(2))
    assert seen[:3, :3].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert not seen[:3, 3:].any() and not seen[3:, :3].any()
    assert seen[3:, 3:].int().tolist()[2] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_64x64_16x6_tn_align4>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "comm"),
        ("Memcpy DtoD (Device -> Device)", "memcpy"),
        ("void transformer_engine::normalization::rmsnorm_fwd_general_kernel", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("_permute_kernel", "permute and sort"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "permute and sort"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor>", "optimizer"),
        ("something_nobody_knows", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_the_peak_of_a_data_sheet_is_that_of_the_card():
    assert named_peak("NVIDIA H100 80GB HBM3", fp8=False) == 989.4e12
    assert named_peak("NVIDIA H100 PCIe", fp8=True) == 1513e12
    assert (
        named_peak("NVIDIA GeForce RTX 4090", fp8=False) is None
        and named_peak("NVIDIA A100-SXM4-80GB", fp8=True) is None
    )


def test_the_places_where_the_host_waits_are_counted_as_cuda_tells_them(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = host_waits(step)
    assert found["host_waits"] == 4 and found["places"].endswith(" 1") and "test_workloads.py" in found["places"]
    assert modes == ["warn", "default"]
