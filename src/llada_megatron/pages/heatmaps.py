"""Heatmaps as PNG files, without a drawing library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.load_colours import colours


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels `[height, width, 3]` (ISO/IEC 15948: 8 bits of red, green and blue, no filter)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def relative(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Each row of counts `[rows, experts]` over its mean, 0 where it has none."""
    means = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, means, out=np.zeros(counts.shape), where=means > 0)


def lift(together: NDArray[np.integer], rows: int) -> NDArray[np.float64]:
    """Rows that chose two experts together over what chance would give; 0 on the diagonal."""
    alone = together.diagonal().astype(float)
    expected = np.outer(alone, alone) / max(rows, 1)
    found = np.divide(together, expected, out=np.zeros(together.shape), where=expected > 0)
    np.fill_diagonal(found, 0.0)
    return found


def heatmap(values: NDArray[np.float64], cell: int = 1) -> bytes:
    """A PNG of values `[rows, columns]`: white at 0, blue at 1 (even, or chance), red at 2 and above."""
    return png(colours(values).repeat(cell, axis=0).repeat(cell, axis=1))


def data_uri(image: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
