"""Megatron's parallel linear layers, which compute a plain product in evaluation.

Parameters, their names and their sharding are Megatron's own, and so is the path that training takes. Megatron drives
each product through two or three autograd functions, whose overhead exceeds the product of a window of a few positions;
without gradients they have nothing to record.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from llada_megatron.llada_moe.model.product import product


class ColumnLinear(ColumnParallelLinear):
    """Y_i = X W_i^T: every tensor rank holds rows of the weight and gives columns of the output."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's.

        Args:
            input_: `[..., input]`, equal on all tensor ranks; under sequence parallelism this rank's positions.

        Returns:
            `[..., output / tensor_parallel]`, and the bias that was not added.
        """
        if not plain(self) or self.gather_output or runtime_gather_output:
            return super().forward(input_, weight, runtime_gather_output)
        return product(input_, self.weight if weight is None else weight), None


class RowLinear(RowParallelLinear):
    """Y = sum_i X_i W_i^T: every tensor rank holds columns of the weight and of the input."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's.

        Args:
            input_: `[..., input / tensor_parallel]`.

        Returns:
            `[..., output]`, equal on all tensor ranks (under sequence parallelism this rank's positions), and the bias
            that was not added.
        """
        if not plain(self) or not self.input_is_parallel:
            return super().forward(input_)
        output = product(input_, self.weight)
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(output, group=self.tp_group)
        return output, None


def unrecorded(module: torch.nn.Module) -> bool:
    """Whether the module runs for its output alone: in evaluation mode, and without gradients."""
    return not (module.training or torch.is_grad_enabled())


def plain(layer: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether the layer is its product and the sum over ranks, and nothing more."""
    return unrecorded(layer) and not (layer.sequence_parallel or layer.explicit_expert_comm or layer.bias is not None)
