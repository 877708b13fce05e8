"""Linear layers that keep what Transformer Engine's keep for delayed scaling, on the CPU.

Attributes are those of `TransformerEngineBaseModule` and `DelayedScalingRecipeState` of Transformer Engine 2.20.2.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


class FP8Linear(torch.nn.Module):
    """One weight, or one for each of `num_gemms` experts."""

    def __init__(self, history: int, num_gemms: int | None = None) -> None:
        super().__init__()
        for number in range(num_gemms or 1):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros(2, 2)))
        if num_gemms is not None:
            self.num_gemms = num_gemms
        add_fp8(self, history)

    def get_extra_state(self):
        """As there: nothing, or a pickle of everything."""
        if self.fp8 or self.fp8_calibration or self.fp8_meta["fp8_checkpoint"]:
            raise AssertionError("a pickle was asked for")
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """Nothing is in it."""
        assert state.numel() == 0


def add_fp8(module: torch.nn.Module, history: int) -> None:
    """Give a module the attributes; its state is made by `init_fp8_meta_tensors`."""

    def init(recipe: object) -> None:
        assert module.fp8_meta["recipe"] is recipe
        for key, operands in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = module.fp8_meta["num_gemms"] * operands
            state = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(history, count))
            module.fp8_meta.setdefault(key, state)

    module.fp8, module.fp8_calibration = False, False
    module.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
    module.init_fp8_meta_tensors = init


def chunk_of(history: int, experts: int, first_layer: int = 0, recipe: str = "delayed") -> torch.nn.Module:
    """A chunk with one layer: a dense linear layer and one of `experts` experts on this rank."""
    layer = torch.nn.Module()
    layer.layer_number = first_layer + 1
    layer.linear_qkv, layer.linear_fc1 = FP8Linear(history), FP8Linear(history, experts)
    chunk = torch.nn.Module()
    chunk.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    return chunk
