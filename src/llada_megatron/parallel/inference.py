"""A checkpoint of any layout as one model in this process, for sampling and evaluation."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.config import from_dict
from llada_megatron.llada_moe.config.schema import LayoutConfig, RunConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer, transformer_config
from llada_megatron.parallel import assembly, checkpoint_manifest, device, topology
from llada_megatron.parallel.checkpoint import CheckpointStore
from llada_megatron.parallel.checkpoint_manifest import DamagedCheckpointError


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, on this process's device."""

    model: DiffusionTransformer
    run: RunConfig
    """The run that made it."""
    path: Path
    """The step directory it was read from."""
    facts: dict[str, Any]
    """The checkpoint's facts."""

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, rows: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocab]` on the host of the selected rows of `tokens` `[batch, seq]`."""
        if not rows.any():
            return torch.zeros(0, self.run.model.vocab_size)
        where = device.current()
        return self.model(tokens.to(where), boundaries, rows=rows.to(where)).float().cpu()

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted cross-entropy of each sequence `[batch]`, in nats."""
        where = device.current()
        labels, weights = batch.labels.to(where), batch.weights.to(where)
        return self.model(batch.inputs.to(where), batch.boundaries, labels, weights).cpu()


def find_checkpoints(path: str | Path) -> list[Path]:
    """What `path` can mean, best first: a step directory itself, or the steps of a run, newest first.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / checkpoint_manifest.FILE_NAME).is_file():
        return [path]
    for directory in (path / "checkpoints", path):
        found = [step for _, step in checkpoint_manifest.steps(directory)]
        if found:
            return found
    raise CheckpointError(f"no checkpoint in {path}: give a run's output directory, or one of its step-… directories")


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[LoadedModel]:
    """Load a step directory, or the newest whole one of a run, in a world of one process.

    Of a run's checkpoints a damaged one is passed over for the one before it. Reading changes nothing in the run's
    directory, which a training may be writing to.

    Raises:
        CheckpointError: there is none, none is whole, or the model in it is of another kind than this version's.
    """
    candidates = find_checkpoints(path)
    with tempfile.TemporaryDirectory(prefix="llada-") as scratch:
        topology.join(0, 1, f"file://{scratch}/rendezvous")
        try:
            topology.initialize(LayoutConfig(), seed=0)
            with warnings.catch_warnings():  # torch and Megatron announce coming changes of their own insides
                warnings.simplefilter("ignore")
                loaded = _load_first(candidates, CheckpointStore(scratch))
            yield loaded
        finally:
            topology.leave()


def _load_first(candidates: list[Path], store: CheckpointStore) -> LoadedModel:
    for path in candidates:
        try:
            return _load(path, store)
        except DamagedCheckpointError as error:
            if path == candidates[-1]:
                raise
            message(f"passed over a damaged checkpoint: {error}")
    raise AssertionError("no candidates")


def _load(path: Path, store: CheckpointStore) -> LoadedModel:
    facts = checkpoint_manifest.read(path).facts
    try:
        run = from_dict(RunConfig, facts["run"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its manifest does not describe a run ({error})") from error
    config = transformer_config(run.model, LayoutConfig(), run.training)
    chunks = assembly.build_chunks(run.model, LayoutConfig(), config, assembly.attention_kind(run))
    state, facts = store.load(path, assembly.model_state(chunks))
    assembly.load_model_state(chunks, state)
    return LoadedModel(chunks[0].eval(), run, path, facts)
