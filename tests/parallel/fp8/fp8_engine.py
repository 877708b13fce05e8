"""A program for test_fp8_state.py: Transformer Engine's own modules on the CPU, where it is installed.

Their constructors ask for a GPU that they do not use; nothing is computed.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

torch.cuda.is_available = lambda: True
import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common.recipe import DelayedScaling  # noqa: E402
from transformer_engine.pytorch import quantization  # noqa: E402

from llada_megatron.parallel.fp8 import fp8_state  # noqa: E402

HISTORY, EXPERTS = 4, 3


def on_the_cpu() -> None:
    """Make the states of recipes on the CPU, as on a Hopper GPU."""
    make = quantization.DelayedScalingRecipeState.__init__

    def made(self, recipe, *, mode, num_quantizers=1, device=None, roles=None):
        make(self, recipe, mode=mode, num_quantizers=num_quantizers, device=torch.device("cpu"), roles=roles)

    quantization.DelayedScalingRecipeState.__init__ = made
    quantization._FP8_SUPPORT, quantization._MXFP8_SUPPORT = (True, ""), (False, "")
    quantization.get_device_compute_capability = lambda: (9, 0)
    torch.cuda.synchronize = lambda *_: None


def chunk() -> torch.nn.Module:
    """One layer with a linear layer, one of experts, and a norm, which has no FP8."""
    layer = torch.nn.Module()
    layer.layer_number = 3
    layer.dense = te.Linear(16, 32, bias=False, device="cpu")
    layer.grouped = te.GroupedLinear(EXPERTS, 16, 32, bias=False, device="cpu")
    layer.norm = te.RMSNorm(16, device="cpu")
    made = torch.nn.Module()
    made.config = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed")
    made.decoder = torch.nn.Module()
    made.decoder.layers = torch.nn.ModuleList([layer])
    return made


def main() -> None:
    """Raises: AssertionError: the state is laid out otherwise than `fp8_state` says."""
    on_the_cpu()
    fp8_state.fp8_utils.get_fp8_recipe = lambda config: DelayedScaling(amax_history_len=HISTORY)
    fp8_state.fp8_utils.get_fp8_context = lambda *_, **__: contextlib.nullcontext()
    model = chunk()
    grouped = model.decoder.layers[0].grouped
    assert [name for name, _ in fp8_state._layers([model])] == ["decoder.layers.2.dense", "decoder.layers.2.grouped"]
    fp8_state.prepare([model])
    tensors = fp8_state.scaling_tensors([model])
    for tensor in tensors:
        tensor.copy_(torch.rand_like(tensor))
    check_columns(grouped)
    kept, packed = [tensor.clone() for tensor in tensors], fp8_state._pack(grouped)
    fp8_state.reset([model])
    fp8_state._unpack(packed, grouped)
    grouped.init_fp8_meta_tensors(DelayedScaling(amax_history_len=HISTORY))  # as the first forward pass does
    again = fp8_state.scaling_tensors([model])
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in tensors]
    assert all(torch.equal(one, other) for one, other in zip(again[4:], kept[4:], strict=True))
    grouped.fp8 = grouped.fp8_meta["fp8_checkpoint"] = True
    assert grouped.get_extra_state().numel() > 0
    with fp8_state.without_pickles(model):
        assert grouped.get_extra_state().numel() == 0
    check_order()


def check_columns(grouped: te.GroupedLinear) -> None:
    """The quantizers of each expert are the columns that `fp8_state` takes for them."""
    packed = fp8_state._pack(grouped)
    columns = {"scaling_fwd": ("input", "weight", "output"), "scaling_bwd": ("grad_output", "grad_input")}
    for key, first in (("scaling_fwd", 0), ("scaling_bwd", 3)):
        stride = grouped._num_fp8_tensors_per_gemm[key.removeprefix("scaling_")]
        for expert in range(EXPERTS):
            for column, operand in enumerate(columns[key]):
                quantizer = grouped.quantizers[key][grouped._offsets[operand] + expert * stride]
                assert packed[expert, 0, first + column] == quantizer.scale, (expert, operand)
                assert packed[expert, 1, first + column] == quantizer.amax, (expert, operand)


def check_order() -> None:
    """An update moves the newest maximum to the end, and the first row is free again."""
    history = torch.tensor([[9.0], [1.0], [2.0], [3.0]])
    quantization._amax_and_scale_update(history, torch.ones(1), 448.0, DelayedScaling(amax_history_len=HISTORY))
    assert history.flatten().tolist() == [0.0, 2.0, 3.0, 9.0]


if __name__ == "__main__":
    main()
