"""Memory of the output layer and loss at a large vocabulary: `llada bench loss` on this machine's device."""

from __future__ import annotations

import argparse

from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.parallel import device
from llada_megatron.parallel.build import default_logits_chunk_mb
from llada_megatron.tools.bench import loss
from llada_megatron.tools.bench.gpu.part_run import PartRun

VOCABULARY, TOKENS, HIDDEN = 157184, 8192, 256
SMALL_CHUNK = 256
"""MiB of logits that exist at a time."""


def compare(part: PartRun) -> None:
    """The masked rows of two windows of 4,096 in chunks, against computing all logits."""
    sizes = {"vocab": VOCABULARY, "tokens": TOKENS, "hidden": HIDDEN, "repeats": 3}
    if part.toy:
        sizes = {"vocab": 2048, "tokens": 512, "hidden": 32, "repeats": 1}
    for name, (kernel, chunk) in cells().items():
        arguments = argparse.Namespace(**sizes, chunk_mb=chunk // SMALL_CHUNK if part.toy else chunk)
        part.measure(name, loss.figures, arguments, kernel)


def cells() -> dict[str, tuple[str | None, int]]:
    """What computes the cross-entropy of a chunk, and MiB of a chunk, by the name of a measurement: this project's own
    with small chunks and with those that a training on this machine has, and each fused kernel that is here."""
    ways: list[tuple[str | None, int]] = [(None, SMALL_CHUNK), (None, default_logits_chunk_mb())]
    if device.cuda_available():
        ways += [(kernel, SMALL_CHUNK) for kernel in ("native", *(["te"] if transformer_engine_active() else []))]
    return {cell(*way): way for way in ways}


def cell(kernel: str | None, chunk: int) -> str:
    """The name of a measurement."""
    return f"vocabulary {VOCABULARY:,}, chunks of {chunk} MiB" + (f", cross-entropy of {kernel}" if kernel else "")
