"""Stand-ins for the peers' clones."""

from __future__ import annotations

from pathlib import Path

from llada_megatron.llada_moe.huggingface.formats import modeling_files

ONE_FORWARD = """
import torch
{imports}
def {name}(model, prompt, steps=1, gen_length=128, block_length=32, mask_id=0{options}):
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], dim=1)
    best = model(x).logits.argmax(-1)
    model(x[:, :7])
    x[:, prompt.shape[1]:] = best[:, prompt.shape[1]:]
    return {result}
"""


def write_clones(directory: Path) -> Path:
    """Folders laid out like the clones: our own modelling file, and samplers of two forward passes."""
    fast = directory / "Fast-dLLM" / "llada"
    (fast / "model").mkdir(parents=True)
    for file in modeling_files("llada"):
        (fast / "model" / file.name).write_bytes(file.read_bytes())
    imports, options = "from model.modeling_llada import LLaDAModelLM", ", threshold=None"
    text = "".join(
        ONE_FORWARD.format(imports=imports, name=name, options=options, result="x, 2")
        for name in ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")
    )
    (fast / "generate.py").write_text(text)
    (directory / "LLaDA").mkdir()
    own = ONE_FORWARD.format(imports="", name="generate", options="", result="x")
    (directory / "LLaDA" / "generate.py").write_text(own)
    return directory
