"""What a run reports: scalars to metrics.jsonl and TensorBoard, and the figures derived from a training step.

Nothing here waits for the device while training goes on: values stay tensors until `MetricsWriter.flush`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llada_megatron.parallel.metrics_board import Board
from llada_megatron.parallel.metrics_file import FILE_NAME, parse_line

SCHEMA = 1
"""Version of the lines in metrics.jsonl; raised when a key changes its meaning."""

Scalar = float | int | torch.Tensor


class MetricsWriter:
    """Writes one JSON object per reported step to RUN_DIR/metrics.jsonl, and the same scalars to TensorBoard.

    `from_step`: the first step that this process may report. A run that resumes takes over the lines before it and
    drops the others (and a last line cut short by a kill), so that no step appears twice. Only one process may write.
    Lines that cannot be written, on a full disk for instance, wait for the next `flush`.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool = True, from_step: int = 0) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._pending: list[tuple[int, dict[str, Scalar]]] = []
        self._open(from_step)

    def _open(self, from_step: int) -> None:
        _drop_lines_from(self._path, from_step)
        self._file = self._path.open("ab", buffering=0)  # so that it is known how much of a line is on a full disk
        self._unwritten, self._told = b"", False
        self._board = Board(self._path.parent / "tensorboard", from_step) if self._tensorboard else None

    def go_back(self, from_step: int) -> None:
        """Drop what was written of `from_step` and later: these steps are run again, as after a resume."""
        self._pending.clear()
        self.close()
        self._open(from_step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard."""
        if self._board is not None:
            self._board.add_text(step, name, text)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Keeps the scalars of a step; tensors of one element stay on their device until `flush`.

        `values` must hold `consumed_sequences`, so that a line means the same under any batch size.
        """
        if "consumed_sequences" not in values:
            raise ValueError("values must hold 'consumed_sequences'")
        self._pending.append((step, {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()}))

    def flush(self) -> list[dict[str, Any]]:
        """Writes what is kept, and returns the lines. Waits for the device once. Call before a checkpoint counts."""
        lines = [{"schema": SCHEMA, "step": step, **values} for step, values in _to_numbers(self._pending)]
        self._pending.clear()
        for line in lines:
            finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
            self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._write_file()
        if self._board is not None:
            self._board.add(lines)
        return lines

    def _write_file(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._told:
                logging.getLogger(__name__).warning("lines wait until %s can be written: %s", self._path, error)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _drop_lines_from(path: Path, from_step: int) -> None:
    """Cuts the file off after its last whole line of an earlier step, which a full disk does not hinder."""
    if not path.exists():
        return
    size = end = 0
    with path.open("rb") as file:
        for text in file:
            size += len(text)
            line = parse_line(text) if text.endswith(b"\n") else None
            if line is not None and line["step"] < from_step:
                end = size
    if end < size:
        os.truncate(path, end)


def _to_numbers(pending: list[tuple[int, dict[str, Scalar]]]) -> list[tuple[int, dict[str, float | int]]]:
    """All kept tensors as Python numbers through one copy per device."""
    tensors = [v for _, values in pending for v in values.values() if isinstance(v, torch.Tensor)]
    numbers: dict[int, float] = {}
    for device in {t.device for t in tensors}:
        here = [t for t in tensors if t.device == device]
        stacked = torch.stack([t.reshape(()).to(torch.float64) for t in here])
        numbers.update(zip(map(id, here), stacked.tolist(), strict=True))
    return [
        (step, {k: numbers[id(v)] if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        for step, values in pending
    ]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits needed per UTF-8 byte: nats per token / ln 2 / bytes per token. Comparable between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


class MaskRatioLoss:
    """Mean cross-entropy of the masked positions, by the mask ratio of their sequence, in equal bins of (0, 1].

    Sums of numerator and denominator are kept on the device; ranks that hold the same sequences (tensor parallel)
    count both twice, which leaves the mean as it is. Ranks without a loss (early pipeline stages) add nothing.
    """

    def __init__(self, bins: int = 10, device: torch.device | str = "cpu") -> None:
        self.bins = bins
        self._sums = torch.zeros(2, bins, dtype=torch.float64, device=device)

    def add(self, weighted_loss: torch.Tensor, mask_ratio: torch.Tensor, masked: torch.Tensor) -> None:
        """Adds sequences, all `[batch]`: sum of cross-entropy / p, the mask ratio p, and the masked positions.

        Under context parallelism give this rank's part of the sums and of the positions.
        """
        device = self._sums.device
        p = mask_ratio.to(device, torch.float32)  # in float32 a ratio such as 0.2 lies on its edge, not beyond it
        bin_of = (torch.ceil(p * self.bins).long() - 1).clamp_(0, self.bins - 1)
        loss = weighted_loss.detach().to(device, torch.float64) * p
        self._sums.index_add_(1, bin_of, torch.stack([loss, masked.to(device, torch.float64)]))

    def reset(self) -> None:
        """Forget what was added since the last `reduce`."""
        self._sums.zero_()

    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call, by name of the bin (bins without a position left out).

        Collective where a process group exists.
        """
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, count = self._sums.tolist()
        self.reset()
        edges = [i / self.bins for i in range(self.bins + 1)]
        return {
            f"loss_by_mask_ratio/{edges[i]:.2g}-{edges[i + 1]:.2g}": loss[i] / count[i]
            for i in range(self.bins)
            if count[i] > 0
        }


class Throughput:
    """Tokens per second and model-FLOPs utilisation between two readings.

    `flops_per_token`: see `llada_moe.model.flops`.
    """

    def __init__(self, flops_per_token: float) -> None:
        self._flops_per_token = flops_per_token
        self._tokens, self._steps = 0, 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Counts a finished step of `tokens` tokens over all ranks."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of a validation or a checkpoint."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def restart(self) -> None:
        """Starts the interval anew, e.g. after warm-up."""
        self._tokens, self._steps, self._since = 0, 0, time.perf_counter()

    def read(self, peak_flops: float) -> dict[str, float]:
        """Figures since the last reading, which it ends. Read after `flush`, which waits for the device.

        `peak_flops`: measured FLOP/s of all ranks together.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tokens_per_second, steps = self._tokens / seconds, max(self._steps, 1)
        self.restart()
        return {
            "tokens_per_second": tokens_per_second,
            "seconds_per_step": seconds / steps,
            "model_flops_utilization": tokens_per_second * self._flops_per_token / peak_flops,
        }
