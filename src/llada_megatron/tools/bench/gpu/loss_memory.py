"""Memory of the output layer and loss at a large vocabulary: `llada bench loss` on this machine's device."""

from __future__ import annotations

import argparse

from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.parallel import device
from llada_megatron.tools.bench import loss
from llada_megatron.tools.bench.gpu.part_run import PartRun

VOCABULARY, TOKENS, HIDDEN = 157184, 8192, 256


def compare(part: PartRun) -> None:
    """Chunks of 256 MiB of the masked rows of two windows of 4,096, against computing all logits."""
    sizes = {"vocab": VOCABULARY, "tokens": TOKENS, "hidden": HIDDEN, "chunk_mb": 256, "repeats": 3}
    if part.toy:
        sizes = {"vocab": 2048, "tokens": 512, "hidden": 32, "chunk_mb": 1, "repeats": 1}
    for kernel in kernels():
        part.measure(cell(kernel), loss.figures, argparse.Namespace(**sizes), kernel)


def kernels() -> list[str | None]:
    """Ways to compute the cross-entropy of a chunk: operations of their own, and the fused kernels that are here."""
    return [None, "native", *(["te"] if transformer_engine_active() else [])] if device.cuda_available() else [None]


def cell(kernel: str | None) -> str:
    """The name of a measurement."""
    return f"vocabulary {VOCABULARY:,}" + (f", cross-entropy of {kernel}" if kernel else "")
