"""The samplers of LLaDA and Fast-dLLM, imported from clones on this disk and run on weights of this project.

Nothing of theirs is part of this project. Both run Fast-dLLM's model, in fp32: LLaDA's `generate` asks no more of a
model than its logits. The work that they make the model do is counted.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.huggingface.safetensors_reader import TensorDirectory
from llada_megatron.tools.bench.sampling.candidates import Generated, Work
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint

FAST_DLLM, LLADA = "Fast-dLLM", "LLaDA"
URLS = {FAST_DLLM: "https://github.com/NVlabs/Fast-dLLM", LLADA: "https://github.com/ML-GSAI/LLaDA"}
_FOLDERS = {FAST_DLLM: ("llada", "v1/llada"), LLADA: (".",)}
_PACKAGE = "llada_megatron_peers"


@dataclass(frozen=True)
class PeerFiles:
    """The files of both projects that are run, imported."""

    llada: ModuleType
    """LLaDA's generate.py."""
    fast_dllm: ModuleType
    """Fast-dLLM's generate.py for LLaDA."""
    modeling: ModuleType
    """Fast-dLLM's modelling file, whose attention can read and write a cache."""


def import_peers(clones: Path) -> PeerFiles:
    """Import both projects from the folders `Fast-dLLM` and `LLaDA` of `clones`. This runs their code.

    Raises:
        ResourceError: a clone is missing, or a package that their files import.
    """
    fast, llada = (_find(clones, name) for name in (FAST_DLLM, LLADA))
    with _without_compilation():
        fast_package = _package(f"{_PACKAGE}.fast_dllm", fast)
        modeling = _import(f"{fast_package}.model.modeling_llada")
        _import("transformers").logging.set_verbosity_error()  # their model uses names that version 5 warns of
        with _also_known_as({"model": f"{fast_package}.model", "model.modeling_llada": modeling.__name__}):
            fast_dllm = _import(f"{fast_package}.generate")
        return PeerFiles(_import(f"{_package(f'{_PACKAGE}.llada', llada)}.generate"), fast_dllm, modeling)


def _find(clones: Path, name: str) -> Path:
    folders = [Path(clones) / name / folder for folder in _FOLDERS[name]]
    found = next((folder for folder in folders if (folder / "generate.py").is_file()), None)
    if found is None:
        raise ResourceError(
            f"{Path(clones) / name} holds no sampler of {name} (generate.py); run: "
            f"git clone {URLS[name]} {Path(clones) / name}"
        )
    return found


def _package(name: str, folder: Path) -> str:
    """Make `folder` a package of this name, so that its files can be imported without a place on the search path."""
    for part, path in ((_PACKAGE, []), (name, [str(folder.resolve())])):
        known = sys.modules.get(part)
        if known is None or list(known.__path__) != path:
            for stale in [module for module in sys.modules if module.startswith(f"{part}.")]:
                del sys.modules[stale]
            module = ModuleType(part)
            module.__path__ = path
            sys.modules[part] = module
    return name


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(_PACKAGE):
            raise ResourceError(f"the clone is incomplete ({error}); clone it anew") from error
        package = "'llada-megatron[dev]'" if error.name == "transformers" else error.name
        raise ResourceError(f"the peers need {error.name}, which is missing; run: pip install {package}") from error


@contextlib.contextmanager
def _also_known_as(names: dict[str, str]) -> Iterator[None]:
    """Let imported modules be found under other names for a while: their scripts run inside their own folder."""
    with mock.patch.dict(sys.modules, {name: sys.modules[module] for name, module in names.items()}):
        yield


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """Fast-dLLM compiles one call of torch's attention, which needs a C++ compiler here and fuses nothing."""

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    with mock.patch.object(torch, "compile", as_it_is):
        yield


Cache = Literal["none", "prefix", "dual"]
_FAST_DLLM = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


class PeerSamplers:
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


def load_peers(clones: Path, checkpoint: Path) -> PeerSamplers:
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
        export_checkpoint(Path(checkpoint), exported, ExportOptions(dtype=torch.float32, without_tokenizer=True))
        config = json.loads((exported / "config.json").read_text())
        with TensorDirectory(exported) as weights:
            state = {name: weights.read(name) for name in weights.tensors}
    return PeerSamplers(files, _build(files.modeling, config, state), config["mask_token_id"])


def _build(modeling: Any, config: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Their model with these weights. It was written for transformers 4; version 5 asks a model for two things more."""
    kind = modeling.LLaDAModelLM
    kind.tie_weights, kind.all_tied_weights_keys = (lambda *_, **__: None), {}
    built = kind(modeling.LLaDAConfig(**config))
    built.config.use_cache = False  # version 5 keeps it elsewhere, and their model reads it
    built.load_state_dict(state, strict=True)
    return built.eval()
