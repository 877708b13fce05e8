"""Figures derived from training steps: loss by mask ratio, tokens per second.

Nothing here waits for the device while training goes on: values stay tensors until `reduce` or `MetricsWriter.flush`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from llada_megatron.llada_moe.evaluation.mask_ratio_bins import BINS, bin_names, bin_of


class MaskRatioLoss:
    """Mean cross-entropy of the masked positions, by the mask ratio of their sequence, in equal bins of (0, 1].

    Sums of numerator and denominator are kept on the device; ranks that hold the same sequences (tensor parallel)
    count both twice, which leaves the mean as it is. Ranks without a loss (early pipeline stages) add nothing.
    """

    def __init__(self, bins: int = BINS, device: torch.device | str = "cpu") -> None:
        self.bins = bins
        self._sums = torch.zeros(2, bins, dtype=torch.float64, device=device)

    def add(self, weighted_loss: torch.Tensor, mask_ratio: torch.Tensor, masked: torch.Tensor) -> None:
        """Adds sequences, all `[batch]`: sum of cross-entropy / p, the mask ratio p, and the masked positions.

        Under context parallelism give this rank's part of the sums and of the positions.
        """
        device = self._sums.device
        p = mask_ratio.to(device, torch.float32)
        loss = weighted_loss.detach().to(device, torch.float64) * p
        self._sums.index_add_(1, bin_of(p, self.bins), torch.stack([loss, masked.to(device, torch.float64)]))

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
        names = bin_names(self.bins)
        return {f"loss_by_mask_ratio/{names[i]}": loss[i] / count[i] for i in range(self.bins) if count[i] > 0}


class Throughput:
    """Tokens per second and model-FLOPs utilisation between two readings.

    `flops_per_token`: see `llada_moe.model.flops`.
    """

    def __init__(self, flops_per_token: float) -> None:
        self._flops_per_token = flops_per_token
        self._tokens, self._steps, self._flops = 0, 0, 0.0
        self._since = time.perf_counter()

    def add(self, tokens: int, flops_per_token: float | None = None) -> None:
        """Counts a finished step of `tokens` tokens over all ranks; `flops_per_token`: of this step, if it differs."""
        self._tokens += tokens
        self._flops += tokens * (self._flops_per_token if flops_per_token is None else flops_per_token)
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of a validation or a checkpoint."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def restart(self) -> None:
        """Starts the interval anew, e.g. after warm-up."""
        self._tokens, self._steps, self._flops, self._since = 0, 0, 0.0, time.perf_counter()

    def read(self, peak_flops: float) -> dict[str, float]:
        """Figures since the last reading, which it ends. Read after `flush`, which waits for the device.

        `peak_flops`: measured FLOP/s of all ranks together.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tokens_per_second, steps, flops = self._tokens / seconds, max(self._steps, 1), self._flops
        self.restart()
        return {
            "tokens_per_second": tokens_per_second,
            "seconds_per_step": seconds / steps,
            "model_flops_utilization": flops / seconds / peak_flops,
        }
