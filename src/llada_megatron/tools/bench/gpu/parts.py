"""The parts of `llada bench gpu`: what each measures, how long it may take, and in which kind of process it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llada_megatron.tools.bench.gpu.part_run import PartRun

AS_TRAINED = "as trained"
"""With all that a training on this machine has."""
EXACT = "exact"
"""The same without TF32, so that fp32 is fp32."""
EXACT_LOCAL = "exact, without Transformer Engine"
ON_CPU = "on the CPU"
"""The GPU is hidden."""

START_SECONDS = 10
"""An estimate of what a process takes to import torch, Transformer Engine and Megatron on a GPU machine."""


@dataclass(frozen=True)
class Part:
    """One part. `seconds` is an estimate for an H100, and what the part may take there before it is cut."""

    name: str
    process: str
    seconds: int
    function: str
    """Module of this package and function, called with a `PartRun`."""
    text: str
    beside: tuple[str, ...] = ()
    """Parts that it can run at the same time as, where they come just before it: neither's figures are times, or it
    leaves the GPU alone."""
    needs: str = ""
    """A part whose results it reads; that one comes before."""

    def load(self) -> Callable[[PartRun], None]:
        """The function; its module imports torch and Megatron."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"llada_megatron.tools.bench.gpu.{module}"), name)


PARTS = (
    Part("environment", AS_TRAINED, 4, "machine_figures:environment", "what `llada env` prints, and the GPU's facts"),
    Part("ceilings", AS_TRAINED, 4, "machine_figures:ceilings", "matrix products in bf16 and FP8, and a copy"),
    Part(
        "reference",
        ON_CPU,
        16,
        "agreement:reference",
        "fp32 losses and gradients of every family on the CPU",
        beside=("environment", "ceilings"),
    ),
    Part(
        "exact",
        EXACT,
        80,
        "agreement:compare",
        "the same on the GPU with all there is; bf16; 50 steps of the demo's model",
        needs="reference",
    ),
    Part(
        "exact-local",
        EXACT_LOCAL,
        40,
        "agreement:compare_local",
        "the same on the GPU without Transformer Engine; bf16 over packed windows",
        beside=("exact",),
        needs="reference",
    ),
    Part("dense", AS_TRAINED, 18, "step_speed:dense", "training steps of a dense model of 1.5 B parameters, bf16"),
    Part(
        "llada-8b",
        AS_TRAINED,
        34,
        "step_speed:llada_8b",
        "the same of eight layers of LLaDA-8B, bf16 and every FP8 recipe",
    ),
    Part("moe", AS_TRAINED, 28, "step_speed:moe", "the same of as many layers of LLaDA-MoE-7B-A1B as fit, bf16"),
    Part(
        "moe-rank",
        AS_TRAINED,
        38,
        "step_speed:moe_rank",
        "what a rank of expert parallel 8 computes of it: 8 experts with all their tokens, not exchanged; bf16, FP8",
    ),
    Part(
        "mini",
        AS_TRAINED,
        24,
        "step_speed:mini",
        "the same of as many layers of LLaDA2-mini as fit, block-causal, bf16",
    ),
    Part("fp8-loss", AS_TRAINED, 76, "fp8_loss:compare", "the loss of 200 steps in each FP8 recipe against bf16"),
    Part(
        "attention",
        AS_TRAINED,
        30,
        "attention_speed:compare",
        "packed attention against a dense mask, 4,096 and 16,384",
    ),
    Part("loss", AS_TRAINED, 20, "loss_memory:compare", "memory of the loss at a vocabulary of 157,184"),
    Part(
        "sampler",
        AS_TRAINED,
        36,
        "sampling_speed:compare",
        "LLaDA-MoE-7B-A1B's shape, blocks of 32, batches of 1 and 32, in bf16 and FP8",
    ),
    Part("checkpoint", AS_TRAINED, 12, "checkpoint_speed:compare", "a checkpoint saved and loaded"),
    Part("profile", AS_TRAINED, 18, "kernel_profile:profile", "the kernels of one training step, by kind"),
)
"""In the order in which they run."""

BY_NAME = {part.name: part for part in PARTS}


def chosen(names: Sequence[str] | None) -> list[Part]:
    """The named parts, or all, with those whose results they need, in the order in which they run."""
    if not names:
        return list(PARTS)
    needed = {*names, *(BY_NAME[name].needs for name in names)}
    return [part for part in PARTS if part.name in needed]


def stages(parts: Sequence[Part]) -> list[list[list[Part]]]:
    """What runs one after another: each a list of groups of parts that run at the same time, a process for each group.

    Neighbours of one kind of process share it; one that can run `beside` all the parts before it is a group of its own.
    """
    found: list[list[list[Part]]] = []
    for part in parts:
        last = found[-1] if found else []
        if last and all(each.name in part.beside for group in last for each in group):
            last.append([part])
        elif len(last) == 1 and not part.beside and _shared(last[0][-1], part):
            last[0].append(part)
        else:
            found.append([[part]])
    return found


def _shared(before: Part, part: Part) -> bool:
    return before.process == part.process and not before.beside


def planned_seconds(parts: Sequence[Part]) -> int:
    """Seconds of all parts, by their estimates, with the starts of the processes."""
    return sum(
        max(START_SECONDS + sum(part.seconds for part in group) for group in together) for together in stages(parts)
    )
