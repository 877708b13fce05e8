"""A model filled from a checkpoint of any layout: in this process alone, or over the ranks of another layout."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from llada_megatron.console import message
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.model import lora
from llada_megatron.llada_moe.model.head import Targets
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.objectives import checkpoint_objective, make_objective
from llada_megatron.parallel import build, device, sharded_state, topology
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from llada_megatron.parallel.checkpoint.search import find_checkpoints, first_whole, run_of, without_factors
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.fp8 import fp8_inference, fp8_weights

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: this rank's part of it, on its device."""

    model: DiffusionTransformer
    run: RunConfig
    """The configuration of the run that made the checkpoint; low-rank factors are merged into the weights."""
    path: Path
    """The step directory it was read from."""
    metadata: dict[str, Any]
    """What its manifest says of the run: step, layout, tokenizer and so on, as JSON values."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """What it is spread over now."""

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, rows: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, vocab]` on the host of the selected rows of `tokens` `[batch, seq]`, equal on all ranks.

        This is for evaluation and for comparing models; sampling computes statistics where the logits are
        (`parallel.sampling`). Collective: every rank gives the same arguments.

        Args:
            rows: `[batch, seq]` bool on the host, true for the selected positions.
            boundaries: cumulative lengths of the documents, int32.
        """
        count = int(rows.sum())
        if count == 0:
            return torch.zeros(0, self.run.model.vocab_size)
        where = device.current()
        here = tokens.to(where)
        shard = self.through_stages(lambda model: model(here, boundaries, rows=rows), *tokens.shape)
        if torch.distributed.get_world_size() == 1:
            return shard.float().cpu()
        return _equal_everywhere(shard, count, self.run.model.vocab_size).cpu()

    def through_stages(
        self, forward: Callable[[DiffusionTransformer], torch.Tensor], batch: int, length: int
    ) -> torch.Tensor | None:
        """One pass: `forward` calls each stage's model on inputs `[batch, length]` that it knows itself (collective).

        Returns what it returned on the last pipeline stage, None before it.
        """

        def forward_step(_: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            return forward(model), lambda output, non_loss_data=True: output

        stored = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return stored[0] if stored else None

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted cross-entropy of each sequence `[batch]`, in nats; in a world of one process."""
        where = device.current()
        targets = Targets.of(batch.labels, batch.weights).to(where)
        return self.model(batch.inputs.to(where), batch.boundaries, targets=targets).cpu()


@contextmanager
def open_checkpoint(
    path: str | Path, precision: Precision | None = None, fp8: str | None = None
) -> Iterator[LoadedModel]:
    """Load a step directory, or the newest whole one of a run, in a world of one process.

    A damaged checkpoint of a run is skipped for the one before it. Nothing in the run's directory is changed: a
    training may be writing to it. `precision`: that of the model; None = that of its run. `fp8`: a recipe of FP8 that
    its layers keep their weights and compute in, without `precision`.

    Raises:
        CheckpointError: there is none, none is whole, or it holds a model that this version does not know.
        ConfigError, ResourceError: FP8 cannot be, for the reason that is given.
    """
    candidates = find_checkpoints(path)
    with topology.world_of_one() as scratch:
        yield _in_precision(_load_first(candidates, LayoutConfig(), CheckpointStore(scratch), fp8), precision)


@torch.no_grad()
def _in_precision(loaded: LoadedModel, precision: Precision | None) -> LoadedModel:
    """The same weights in a model of this precision (None = that of the run); for a moment there may be both."""
    if precision in (None, loaded.run.training.precision):
        return loaded
    run = replace(loaded.run, training=replace(loaded.run.training.without_fp8(), precision=precision))
    training = replace(run.training, recompute="none", recompute_modules=[])
    config = build.transformer_config(run.model, loaded.layout, training)
    with warnings.catch_warnings():  # as in `_load_first`
        warnings.simplefilter("ignore")
        (model,) = build.build_chunks(run.model, loaded.layout, config, loaded.model.pattern)
    kept = loaded.model.state_dict()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(kept[name])
    return replace(loaded, model=model.eval(), run=run)


@contextmanager
def open_weights(
    model: ModelConfig, objective: ObjectiveConfig, read: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> Iterator[DiffusionTransformer]:
    """A model in float32 in a world of one process, filled with the weights that `read` gives.

    Args:
        read: as for `sharded_state.fill_weights`.
    """
    with topology.world_of_one():
        with warnings.catch_warnings():  # torch and Megatron warn of coming changes in their own internals
            warnings.simplefilter("ignore")
            config = build.transformer_config(model, LayoutConfig())
            chunks = build.build_chunks(
                model, LayoutConfig(), config, make_objective(objective).sampling_pattern(step=0)
            )
        with torch.no_grad():
            sharded_state.fill_weights(chunks, read)
        yield chunks[0].eval()


def load_checkpoint(
    path: str | Path, layout: LayoutConfig, precision: Precision | None = None, fp8: str | None = None
) -> LoadedModel:
    """Load what `open_checkpoint` would, spread over the ranks of `layout`, whose process groups exist (collective)."""
    with tempfile.TemporaryDirectory(prefix="llada-") as scratch:
        return _in_precision(_load_first(find_checkpoints(path), layout, CheckpointStore(scratch), fp8), precision)


def _equal_everywhere(shard: torch.Tensor | None, rows: int, vocab: int) -> torch.Tensor:
    """The whole logits `[rows, vocab]`, gathered from the tensor-parallel ranks of the last stage.

    All ranks get those of one rank, because data-parallel copies may differ in the last bit.
    """
    if shard is None:
        whole = torch.empty(rows, vocab, device=device.current())
    else:
        whole = gather_from_tensor_model_parallel_region(shard).float().contiguous()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    world = torch.distributed.get_world_size()
    torch.distributed.broadcast(whole, src=(stages - 1) * (world // stages))  # stages are the slowest axis of the ranks
    return whole


def _load_first(
    candidates: list[Path], layout: LayoutConfig, store: CheckpointStore, fp8: str | None = None
) -> LoadedModel:
    def report(text: str) -> None:
        if torch.distributed.get_rank() == 0:
            message(text)

    with warnings.catch_warnings():  # torch and Megatron warn of coming changes in their own internals
        warnings.simplefilter("ignore")
        return first_whole(candidates, lambda path: _load(path, layout, store, fp8), report)


def _load(path: Path, layout: LayoutConfig, store: CheckpointStore, fp8: str | None) -> LoadedModel:
    run = run_of(path)
    if fp8 is not None:
        fp8_inference.require(fp8, run, layout)
    saved = store.metadata(path)
    if "step" not in saved:
        raise DamagedCheckpointError(f"{path}: its manifest does not say of which step it is")
    pattern = checkpoint_objective(run, saved).sampling_pattern(int(saved["step"]))
    chunks = empty_chunks(run, layout, pattern, fp8)
    with fp8_weights.filling(chunks):
        state, metadata = store.load(path, sharded_state.model_state(chunks))
        sharded_state.load_model_state(chunks, state)
    if run.training.lora is not None:
        lora.merge(chunks)
        run, metadata = replace(run, training=replace(run.training, lora=None)), without_factors(metadata)
    return LoadedModel(chunks[0].eval(), run, path, metadata, layout)


@torch.no_grad()  # so that Transformer Engine keeps of FP8 weights what the forward pass reads
def empty_chunks(
    run: RunConfig, layout: LayoutConfig, pattern: AttentionPattern, fp8: str | None = None
) -> list[DiffusionTransformer]:
    """The chunks of this rank for passes outside training, without weights. `fp8`: as for `open_checkpoint`."""
    usual = replace(run.training.without_fp8(), recompute="none", recompute_modules=[])
    if fp8 is None:
        config = build.transformer_config(run.model, layout, usual)
        return build.build_chunks(run.model, layout, config, pattern, factors=run.training.lora)
    training = fp8_inference.training_keys(fp8, replace(usual, fp8=run.training.fp8))
    config = build.transformer_config(run.model, layout, training)
    fp8_inference.adapt(config)
    chunks = build.build_chunks(run.model, layout, config, pattern)
    fp8_inference.pad_products(chunks)
    return chunks
