"""`llada bench parity`: every layout computes the loss and the gradients of one process."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, at_most
from llada_megatron.tools.bench.layouts import (
    DENSE_LAYOUTS,
    EDITING,
    MODELS,
    MOE_LAYOUTS,
    parity_run,
    with_operations,
)

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.batch import Samples

GOAL = 1e-5
"""Largest relative error of the loss and of any gradient, in fp32."""

FAST = ("dense TP2.SP", "dense PP2 interleaved", "dense CP2", "dense DP2", "softmax EP2", "softmax TP2.SP.ETP2")
"""The cases of `--fast`."""

BLOCK_SIZE = 5
"""Block size of the block-causal cases; it divides neither the documents nor a context rank's share of the sequence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: which layouts are measured."""
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cases whose name contains TEXT")
    parser.add_argument("--fast", action="store_true", help="only one case of each axis, over two ranks")


def run(args: argparse.Namespace) -> list[Claim]:
    """One claim a layout: the largest relative error of loss and gradients.

    Raises:
        ConfigError: `--only` leaves no case.
    """
    claims = []
    references: dict[str, Gradients] = {}
    for name, case in cases():
        if args.only.lower() not in name.lower() or (args.fast and name not in FAST):
            continue
        family = f"{name.split(' ')[0]} {case.objective} {case.model.delete_token_id}"
        if family not in references:
            references[family] = measure(dataclasses.replace(case, layout=LayoutConfig()))
        error, where = compare(references[family], measure(case))
        claims.append(at_most(f"{name}: largest relative error against one process ({where})", error, "", GOAL))
        message(f"{name}: {error:.1e} at {where}")
    if not claims:
        fast = f"; --fast has {', '.join(FAST)}" if args.fast else f"; the first is {next(cases())[0]!r}"
        raise ConfigError(f"--only {args.only}: no case has this in its name{fast}")
    return claims


def cases() -> Iterator[tuple[str, RunConfig]]:
    """Every layout over the models it fits."""
    for name, layout in DENSE_LAYOUTS.items():
        yield f"dense {name}", parity_run(MODELS["dense"], layout)
    for name in ("PP2", "PP2 uneven", "TP2.SP.PP2", "TP2.DP2"):
        yield f"tied {name}", parity_run(MODELS["tied"], DENSE_LAYOUTS[name])
    for model, (name, layout) in itertools.product(("softmax", "sigmoid"), MOE_LAYOUTS.items()):
        yield f"{model} {name}", parity_run(MODELS[model], layout)
    for name in ("TP2.SP.EP2", "PP2.EP2"):
        yield f"sigmoid {name} recomputed", parity_run(MODELS["sigmoid"], MOE_LAYOUTS[name], recompute="full")
    for name in ("TP2.SP", "CP2.EP2", "PP2.EP2"):
        yield f"blocks {name} recomputed", parity_run(MODELS["blocks"], MOE_LAYOUTS[name], recompute="full")
    for name in ("CP2", "TP2.SP.PP2"):
        yield (
            f"dense {name} autoregressive",
            parity_run(MODELS["dense"], DENSE_LAYOUTS[name], objective="autoregressive"),
        )
    for name in ("CP2", "TP2.SP.CP2", "PP2 interleaved"):
        yield f"dense {name} block-causal", parity_run(MODELS["dense"], DENSE_LAYOUTS[name], block_size=BLOCK_SIZE)
    halves: dict[str, Any] = {"objective": "block_diffusion", "block_size": BLOCK_SIZE}
    for name in ("TP2.SP", "CP2", "CP4", "TP2.SP.CP2", "PP2 interleaved", "PP2.DP2"):
        yield f"dense {name} block diffusion", parity_run(MODELS["dense"], DENSE_LAYOUTS[name], **halves)
    for name in ("EP2", "TP2.SP.EP2", "CP2.EP2", "PP2.EP2"):
        yield f"sigmoid {name} block diffusion", parity_run(MODELS["sigmoid"], MOE_LAYOUTS[name], **halves)
    dense, blocks = with_operations(MODELS["dense"]), with_operations(MODELS["blocks"])
    for name in ("TP2.SP.CP2", "PP2 interleaved"):
        yield f"dense {name} editing", parity_run(dense, DENSE_LAYOUTS[name], editing=EDITING, **halves)
    for name in ("TP2.SP.EP2", "TP2.SP.CP2", "CP2.EP2", "PP2.EP2"):
        yield f"blocks {name} editing", parity_run(blocks, MOE_LAYOUTS[name], editing=EDITING, **halves)
    both = {**halves, "objective": "joint"}
    for name in ("TP2.SP", "CP2", "PP2 interleaved", "TP2.SP.PP2"):
        yield f"dense {name} joint", parity_run(MODELS["dense"], DENSE_LAYOUTS[name], **both)
    for name in ("EP2", "TP2.SP.EP2", "CP2.EP2", "PP2.EP2"):
        yield f"sigmoid {name} joint", parity_run(MODELS["sigmoid"], MOE_LAYOUTS[name], **both)
    yield (
        "dense PP2 block diffusion recomputed",
        parity_run(MODELS["dense"], DENSE_LAYOUTS["PP2"], recompute="full", **halves),
    )


@dataclasses.dataclass
class Gradients:
    """Loss of one step and its whole gradients by the parameters' global names."""

    loss: float
    grad_norm: float
    tensors: dict[str, Any]


def measure(run: RunConfig, timeout: float = 180.0) -> Gradients:
    """Loss and gradients of step 0 of `run`, over as many ranks as its layout has."""
    from llada_megatron.parallel.ranks import run_ranks

    parts = run_ranks(rank_gradients, run.layout.world_size, run, timeout=timeout)
    return Gradients(parts[0][0], parts[0][1], join_parts(part for _, _, tensors in parts for part in tensors))


def compare(reference: Gradients, other: Gradients) -> tuple[float, str]:
    """Largest relative error and where: |a - b| / max |a| over each gradient's elements, and the loss's.

    What is not a number on either side is an infinite error.
    """
    if reference.tensors.keys() != other.tensors.keys():
        return float("inf"), f"names differ: {sorted(reference.tensors.keys() ^ other.tensors.keys())[:3]}"
    errors = {
        name: ((a - other.tensors[name]).abs().max() / a.abs().max().clamp(min=1e-12)).item()
        for name, a in reference.tensors.items()
    }
    errors["loss"] = abs(reference.loss - other.loss) / abs(reference.loss)
    errors["gradient norm"] = abs(reference.grad_norm - other.grad_norm) / reference.grad_norm
    errors = {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def join_parts(parts: Iterable[tuple[str, Sequence[int], Sequence[int], Any]]) -> dict[str, Any]:
    """Whole tensors from (name, whole shape, offset, values) parts of all ranks; a missing one stays not-a-number."""
    import torch

    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, values in parts:
        target = whole.setdefault(name, torch.full(tuple(shape), float("nan")))
        target[tuple(slice(a, a + n) for a, n in zip(offset, values.shape, strict=True))] = torch.from_numpy(values)
    return whole


def rank_gradients(run: RunConfig) -> tuple[float, float, list[tuple[str, Sequence[int], Sequence[int], Any]]]:
    """On one rank: loss, gradient norm, and this rank's parts of the gradients of step 0."""
    from llada_megatron.parallel import topology

    topology.initialize(run.layout, run.training.seed)
    return step_gradients(run, SyntheticData(run))


def step_gradients(
    run: RunConfig, data: Samples
) -> tuple[float, float, list[tuple[str, Sequence[int], Sequence[int], Any]]]:
    """The same of a new model of `run` on `data`; the process groups of its layout exist (collective)."""
    import torch

    from llada_megatron.parallel import build
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), data)
    loss = step.gradients(0).loss
    # tensor ranks hold the loss of the same rows, so the sum over the world counts each tensor_parallel times
    torch.distributed.all_reduce(loss)
    gather_gradients(models)
    parts = gradient_parts(chunks)
    step.optimizer.prepare_grads()
    return float(loss) / run.layout.tensor_parallel, float(step.optimizer.get_grad_norm()), parts


def gather_gradients(models: Sequence[Any]) -> None:
    """Whole gradient buffers on every rank: the distributed optimizer leaves each data-parallel rank its shard only."""
    import torch

    for model in models:
        for buffer in model.buffers + model.expert_parallel_buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gradient_parts(chunks: Sequence[Any]) -> list[tuple[str, Sequence[int], Sequence[int], Any]]:
    """(name, whole shape, offset, values) of each of this rank's gradients, found through the sharded state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from llada_megatron.parallel import sharded_state

    parts = []
    for chunk in chunks:
        named = {name: parameter for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        kept = {name: parameter.data for name, parameter in named.items()}
        for parameter in named.values():
            parameter.data = parameter.main_grad.to(parameter.dtype)
        state = sharded_state.apply_factories_copy(chunk)
        for shard in nested_values({name: state[name] for name in named}):
            if isinstance(shard, ShardedTensor):
                values = shard.data.detach().reshape((1,) * shard.prepend_axis_num + tuple(shard.data.shape))
                parts.append((shard.key, shard.global_shape, shard.global_offset, values.float().cpu().numpy().copy()))
        for name, parameter in named.items():
            parameter.data = kept[name]
    return parts


class SyntheticData:
    """Random documents with the run's own noise: sample n is a function of n alone."""

    def __init__(self, run: RunConfig) -> None:
        from llada_megatron.llada_moe.objectives import make_objective

        self.run = run
        self._make_row = make_objective(run.objective, run.training).rows(run, "train", run.model.vocab_size)

    def batch(self, indices: Sequence[int]) -> Any:
        """Samples as `llada_moe.data.training_data.TrainingData.batch` gives them."""
        from llada_megatron.llada_moe.data.batch import collate

        return collate([self._row(number) for number in indices])

    def _row(self, number: int) -> Any:
        import numpy as np

        from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates

        length = self.run.training.sequence_length
        generator = np.random.default_rng(number)
        tokens = generator.integers(0, self.run.model.vocab_size - 2, length)
        cuts = generator.choice(np.arange(1, length), size=number % 3, replace=False)  # one to three documents
        boundaries = np.sort(np.concatenate([[0, length], cuts])).astype(np.int32)
        return self._make_row(tokens, boundaries, SampleCoordinates(number, 0, 0, number))
