"""A program that builds models from Transformer Engine's modules on the meta device, and reports what they are made of.

Call `built(cases)`, which runs it in a process of its own: Megatron must be imported after Transformer Engine, which is
the real one where it is installed and else the stub with the real one's signatures (`tests.te_stub`). A case is

    {"model": name or file, "overrides": [...], "layout": {...}, "training": {...} or None (no training), "rank": 0,
     "sampling": an FP8 recipe in which a checkpoint of that training is opened (optional)}

and a result has, for the chunks of that rank, `config` (the layers' TransformerConfig, its plain values),
`modules` (class of each Transformer Engine module → its numbers by `fuse_wgrad_accumulation`, "fused" or "plain"),
`output_layer` (whether its gradient is fused; None = not on this stage), `recipe` (class of the FP8 recipe that the
layers are run with), `parameters`, `padded` (classes of the modules whose input gets rows until FP8 can tile it) and
`devices`; `experts`, the class of each MoE layer's experts; or `error`, what building raised.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


DENSE_FUSIONS = {
    "gradient_accumulation_fusion": True,
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
}
"""What a training with Transformer Engine fuses, whatever its precision and experts."""


def built(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result per case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.te_builds"], input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def prepare() -> None:
    """Megatron with Transformer Engine, as on a machine with a GPU, for modules without storage."""
    import torch

    from llada_megatron.llada_moe.model import accelerations
    from llada_megatron.parallel import device
    from tests import te_stub

    if not accelerations.present(te_stub.ROOT):
        te_stub.provide()
    accelerations.settle(cuda=True)
    device.install()
    torch.cuda.is_available = lambda: True


def result(case: dict[str, Any]) -> dict[str, Any]:
    from llada_megatron.llada_moe.config import from_dict, load_model
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.llada_moe.config.training import TrainingConfig
    from llada_megatron.llada_moe.model.patterns import FULL
    from llada_megatron.parallel import build, device
    from tests.llada_moe.model.meta_builds import join, leave

    layout = LayoutConfig(**case["layout"])
    size = {"steps": 1, "sequence_length": 64, "global_batch_size": 8}
    training = None if case.get("training") is None else from_dict(TrainingConfig, size | case["training"])
    join(layout, case.get("rank", 0))
    try:
        model = load_model(case["model"], case.get("overrides", []))
        config = build.transformer_config(model, layout, training)
        if case.get("sampling"):
            return summary(opened(model, layout, training, case["sampling"]))
        with device.on_meta():
            return summary(build.build_chunks(model, layout, config, FULL))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        leave()


def opened(model: Any, layout: Any, training: Any, recipe: str) -> list[Any]:
    """The empty chunks that a checkpoint is read into, with the linear layers that add rows."""
    from llada_megatron.llada_moe.config import load_run
    from llada_megatron.llada_moe.model.patterns import FULL
    from llada_megatron.parallel import device
    from llada_megatron.parallel.checkpoint.loaded_model import empty_chunks

    run = replace(load_run("demo"), model=model, layout=layout, training=training)
    with device.on_meta():
        return empty_chunks(run, layout, FULL, recipe)


def summary(chunks: list[Any]) -> dict[str, Any]:
    modules: dict[str, Counter[str]] = {}
    for module in (module for chunk in chunks for module in chunk.modules()):
        if any(base.__module__.startswith("transformer_engine") for base in type(module).__mro__):
            fused = "fused" if getattr(module, "fuse_wgrad_accumulation", False) else "plain"
            modules.setdefault(type(module).__name__, Counter())[fused] += 1
    config = chunks[0].decoder.layers[0].config
    head = getattr(chunks[-1], "output_layer", None)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return {
        "config": {
            field.name: value
            for field in fields(config)
            if isinstance(value := getattr(config, field.name), bool | int | float | str | None)
        },
        "modules": modules,
        "output_layer": None if head is None else head.gradient_accumulation_fusion,
        "recipe": recipe(config),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "padded": sorted({type(m).__name__ for chunk in chunks for m in chunk.modules() if "forward" in vars(m)}),
        "experts": [type(m.experts).__name__ for chunk in chunks for m in chunk.modules() if hasattr(m, "experts")],
        "devices": sorted({str(parameter.device) for parameter in parameters}),
    }


def recipe(config: Any) -> str | None:
    from megatron.core import fp8_utils

    if not config.fp8:
        return None
    fp8_utils.get_fp8_context(config, 1)  # checks its arguments; the real one must not be entered without a GPU
    return type(fp8_utils.get_fp8_recipe(config)).__name__


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    prepare()
    print(json.dumps([result(case) for case in json.load(sys.stdin)]))
