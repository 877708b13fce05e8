"""A kind of GPU: figures of its data sheet, and the shares of them that training reaches.

The files are in configs/gpus; a file of a user's needs the figures of the data sheet only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.llada_moe.config.named import Named
from llada_megatron.llada_moe.config.parsing import Problems, parse

GPUS = Named("GPU", "gpus")


@dataclass(frozen=True, kw_only=True)
class GpuSheet:
    """What one GPU can do, each in the unit of its name; G and T are powers of ten, GiB is 2^30 bytes."""

    name: str
    memory_gib: float
    """What a process can allocate on an empty card."""
    bf16_tflops: float
    """Dense peak."""
    fp8_tflops: float | None = None
    """Dense peak; null = it has no FP8."""
    fp4_tflops: float | None = None
    compute_capability: float | None = None
    """NVIDIA's number of what its processor can do, by which FP8 recipes are refused; null = not known."""
    memory_gb_per_s: float
    link_gb_per_s: float
    """To another GPU of the same node, one direction."""
    network_gb_per_s: float
    """To GPUs of other nodes, one direction, each GPU with its own adapter."""
    gpus_per_node: int = 8
    """GPUs that reach each other at the speed of the link."""
    gemm_share: float = 0.65
    """Share of the bf16 peak that large products reach."""
    gemm_fp8_share: float = 0.5
    """Share of the FP8 peak, with the casts."""
    gemm_fp4_share: float = 0.4
    attention_share: float = 0.5
    """Share of the bf16 peak that attention reaches, forward and backward together."""
    grouped_half_rows: float = 200.0
    """Rows for each expert at which a grouped product reaches half of the share of a large one."""
    memory_share: float = 0.75
    link_share: float = 0.7
    network_share: float = 0.8
    dense_host_us: float = 1000.0
    """The least time of a dense layer and micro-batch, forward and backward, without CUDA graphs: the host gives the
    work that fast."""
    moe_host_us: float = 5000.0
    """The same of a MoE layer, where the host also waits for the counts of the exchange."""
    context_gib: float = 1.0
    """CUDA's context and kernels; an assumption."""
    communicators_gib: float = 3.0
    """NCCL's buffers outside the allocator; an assumption (tools reserve 2 to 6)."""
    reserved_over_allocated: float = 1.05
    """Of the caching allocator; published runs on B200: 1.03 to 1.08."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as torch gives it, (9, 0); None = not known."""
        if self.compute_capability is None:
            return None
        major, minor = divmod(round(10 * self.compute_capability), 10)
        return major, minor

    def peak(self, compute: str) -> float:
        """Operations a second that products reach in `compute` (bf16, fp8, mxfp8, nvfp4 or fp32)."""
        if compute == "nvfp4" and self.fp4_tflops:
            return self.fp4_tflops * self.gemm_fp4_share * 1e12
        if compute in ("fp8", "mxfp8", "nvfp4") and self.fp8_tflops:
            return self.fp8_tflops * self.gemm_fp8_share * 1e12
        return self.bf16_tflops * self.gemm_share * 1e12 / (8 if compute == "fp32" else 1)

    @property
    def memory_rate(self) -> float:
        """Bytes a second to and from its memory."""
        return self.memory_gb_per_s * self.memory_share * 1e9

    @property
    def link_rate(self) -> float:
        """Bytes a second to a GPU of the same node."""
        return self.link_gb_per_s * self.link_share * 1e9

    @property
    def network_rate(self) -> float:
        """Bytes a second to GPUs of other nodes."""
        return self.network_gb_per_s * self.network_share * 1e9


def load_gpu(name_or_path: str) -> GpuSheet:
    """The GPU in `configs/gpus/NAME.yaml` or in a YAML file.

    Raises:
        ConfigError: an unknown name (lists the known ones), or a figure that is missing or cannot be.
    """
    sheet, origins = parse(GpuSheet, GPUS.load(name_or_path))
    problems = Problems()
    for key, value in vars(sheet).items():
        if isinstance(value, float | int) and not (math.isfinite(value) and value > 0):
            problems.add(origins.where(key), key, f"{value} must be a number greater than 0")
        elif key.endswith("_share") and value > 1:
            problems.add(origins.where(key), key, f"{value} is a share, at most 1")
    problems.raise_if_any()
    return sheet


def is_file(name_or_path: str) -> bool:
    """Whether a GPU was named by a file of the user's."""
    return Path(name_or_path).is_file()
