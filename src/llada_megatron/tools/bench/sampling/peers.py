"""The samplers of LLaDA and Fast-dLLM on weights of this project, with a count of the work they do.

Both run Fast-dLLM's model, in fp32: LLaDA's `generate` asks no more of a model than its logits.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.huggingface.safetensors_reader import TensorDirectory
from llada_megatron.tools.bench.sampling.peer_files import PeerFiles, import_peers
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint

Cache = Literal["none", "prefix", "dual"]
_FAST_DLLM = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


@dataclass
class Work:
    """What a sampler made the model do."""

    forwards: int = 0
    """Calls of the model."""
    positions: int = 0
    """Positions that ran through its layers, summed over the calls."""
    logit_rows: int = 0
    """Rows of logits that were computed."""


@dataclass(frozen=True)
class Generated:
    """The result for one prompt."""

    tokens: list[int]
    """The response, `new_tokens` long."""
    work: Work


class Peers:
    """The samplers; one sequence at a time, always the most probable token."""

    def __init__(self, files: PeerFiles, model: torch.nn.Module, mask_id: int) -> None:
        self._files, self._model, self._mask_id = files, model, mask_id
        self._work = Work()
        model.register_forward_hook(self._count, with_kwargs=True)

    @property
    def has_factor(self) -> bool:
        """Whether this version of Fast-dLLM knows the factor rule."""
        return "factor" in inspect.signature(self._files.fast_dllm.generate_with_dual_cache).parameters

    def llada(
        self, prompt: Sequence[int], *, new_tokens: int = 128, steps: int = 128, block_length: int = 32
    ) -> Generated:
        """LLaDA's sampler: the most confident positions of a block, as many in every step."""
        return self._run(self._files.llada.generate, prompt, new_tokens, steps=steps, block_length=block_length)

    def fast_dllm(
        self,
        prompt: Sequence[int],
        *,
        cache: Cache = "none",
        threshold: float | None = None,
        factor: float | None = None,
        new_tokens: int = 128,
        steps: int = 128,
        block_length: int = 32,
    ) -> Generated:
        """Fast-dLLM's sampler (arXiv 2505.22618); without threshold and factor it commits as LLaDA's does.

        Raises:
            ResourceError: a factor is asked of a version that does not know it.
        """
        options: dict[str, Any] = {"steps": steps, "block_length": block_length, "threshold": threshold}
        if factor is not None:
            if not self.has_factor:
                raise ResourceError(f"{self._files.fast_dllm.__file__} has no factor rule; update the clone: git pull")
            options["factor"] = factor
        return self._run(getattr(self._files.fast_dllm, _FAST_DLLM[cache]), prompt, new_tokens, **options)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, seq, vocab]` of tokens `[batch, seq]`."""
        return self._model(tokens).logits

    def _run(self, generate: Callable[..., Any], prompt: Sequence[int], new_tokens: int, **options: Any) -> Generated:
        self._work = Work()
        ids = torch.tensor([list(prompt)])
        result = generate(self._model, ids, gen_length=new_tokens, mask_id=self._mask_id, **options)
        tokens = result[0] if isinstance(result, tuple) else result
        return Generated(tokens[0, ids.shape[1] :].tolist(), self._work)

    def _count(self, _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self._work.forwards += 1
        self._work.positions += (arguments[0] if arguments else named["input_ids"]).numel()
        self._work.logit_rows += output.logits.numel() // output.logits.shape[-1]


def load_peers(clones: Path, checkpoint: Path) -> Peers:
    """The peers on the weights of `checkpoint`, a run of a dense LLaDA, which pass through this project's export.

    Args:
        clones: holds clones of both projects, named Fast-dLLM and LLaDA.

    Raises:
        ResourceError: a clone or a package they need is missing.
        CheckpointError: no checkpoint there.
    """
    files = import_peers(clones)
    with tempfile.TemporaryDirectory(prefix="llada-peers-") as scratch:
        exported = Path(scratch) / "exported"
        export_checkpoint(Path(checkpoint), exported, ExportOptions(dtype=torch.float32))
        config = json.loads((exported / "config.json").read_text())
        with TensorDirectory(exported) as weights:
            state = {name: weights.read(name) for name in weights.tensors}
    return Peers(files, _build(files.modeling, config, state), config["mask_token_id"])


def _build(modeling: Any, config: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Their model with these weights. It was written for transformers 4; version 5 asks a model for two things more."""
    kind = modeling.LLaDAModelLM
    kind.tie_weights, kind.all_tied_weights_keys = (lambda *_, **__: None), {}
    built = kind(modeling.LLaDAConfig(**config))
    built.config.use_cache = False  # version 5 keeps it elsewhere, and their model reads it
    built.load_state_dict(state, strict=True)
    return built.eval()
