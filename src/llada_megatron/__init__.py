"""LLaDA-MoE on Megatron-Core: training and sampling of masked diffusion language models.

`Sampler`, `Prompt`, `Extent` and `Settings` are the Python interface to sampling; they are imported when they are asked
for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# Names, not imports: every module of the package imports this one, and imports run one way.
_INTERFACE = {
    "Extent": "llada_megatron.parallel.sampling.prompts",
    "Prompt": "llada_megatron.parallel.sampling.prompts",
    "Sampler": "llada_megatron.parallel.sampling.sampler",
    "Settings": "llada_megatron.parallel.sampling.settings",
}


def __getattr__(name: str) -> Any:
    if name in _INTERFACE:
        return getattr(importlib.import_module(_INTERFACE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
