"""Taking back what a forward and backward pass changes besides the gradients, which the next pass overwrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Undo:
    """Routers' expert biases and token counts (Megatron updates them with the gradients), and counters of our own."""

    def __init__(self, models: Iterable[torch.nn.Module], counters: Callable[[], list[torch.Tensor]]) -> None:
        """`counters` returns tensors that hooks of the passes change in place."""
        modules = (module for model in models for module in model.modules())
        self._routers = [module for module in modules if isinstance(module, TopKRouter)]
        self._counters = counters
        self._kept: list[torch.Tensor] = []

    def remember(self) -> None:
        """Keep the present state."""
        self._kept = [tensor.clone() for tensor in self._tensors()]

    def take_back(self) -> None:
        """Return to the state that was kept last."""
        for tensor, kept in zip(self._tensors(), self._kept, strict=True):
            tensor.copy_(kept)

    def _tensors(self) -> list[torch.Tensor]:
        return [buffer for router in self._routers for buffer in router.buffers()] + self._counters()
