"""Whether the GPU computes what the CPU does: loss and gradients of every family, and fifty steps of the demo's model.

The CPU's figures come first, from a process that sees no GPU (`reference`), with the same seeds, hence the same
weights, windows and masks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Row, collate
from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel.build import build_run_chunks, wrap
from llada_megatron.parallel.training.distributed_optimizer import build_optimizer, set_learning_rate
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.tools.bench.gpu.part_run import PartRun
from llada_megatron.tools.bench.gpu.workloads import document_boundaries
from llada_megatron.tools.bench.layouts import BLOCKS, DENSE, SIGMOID, SOFTMAX, parity_run
from llada_megatron.tools.bench.measurement import largest
from llada_megatron.tools.bench.parity import Gradients, join_parts, step_gradients
from llada_megatron.tools.bench.parity import compare as worst

FAMILIES = {
    "llada": DENSE,
    "qwen3": dataclasses.replace(DENSE, family="qwen3", qk_norm=True, tie_embeddings=True),
    "llada_moe": SOFTMAX,
    "qwen3_moe": dataclasses.replace(
        SOFTMAX, family="qwen3_moe", moe=dataclasses.replace(SOFTMAX.moe, score_function="softmax_normalized")
    ),
    "llada2": SIGMOID,
    "llada2.2": BLOCKS,
}
"""Every family and kind of routing, at the size of a test: only then are the sums short enough to agree to 1e-5."""

DOCUMENTS = {"whole": 1, "packed": 3}
BLOCK_SIZES = {"full": None, "block-causal": 5}
SEQUENCES = 4
DEMO, DEMO_STEPS, TOY_STEPS = "demo's model", 50, 3


class SyntheticWindows:
    """Stands in for `TrainingData`: windows of a few documents with the run's own noise.

    Sample n is a function of n alone. Tokens follow Zipf's law, so that there is something to learn: how frequent each
    is, and nothing of its neighbours.
    """

    manifests: Sequence[Any] = ()
    bytes_per_token = 1.0

    def __init__(self, run: RunConfig, documents: int) -> None:
        self._run, self._documents = run, documents
        self._make_row = make_objective(run.objective, run.training).rows(run, "train", run.model.vocab_size)
        special = run.model.special_ids
        self._tokens = np.array([token for token in range(run.model.vocab_size) if token not in special])
        weights = 1.0 / np.arange(1, len(self._tokens) + 1)
        self._frequencies = weights / weights.sum()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these numbers."""
        return collate([self._row(number) for number in indices])

    def _row(self, number: int) -> Row:
        length = self._run.training.sequence_length
        boundaries = document_boundaries(1, length, self._documents, number).numpy()
        return self._make_row(self._text(number, boundaries), boundaries, SampleCoordinates(number, 0, 0, number))

    def _text(self, number: int, boundaries: NDArray[np.int32]) -> NDArray[np.int64]:
        return np.random.default_rng(number).choice(self._tokens, size=boundaries[-1], p=self._frequencies)


def cases(toy: bool) -> dict[str, tuple[RunConfig, int]]:
    """Runs and their documents per window, by name."""
    found = {}
    for family, packing, attention in itertools.product(FAMILIES, DOCUMENTS, BLOCK_SIZES):
        if toy and (family not in ("llada", "llada2") or (packing, attention) != ("packed", "block-causal")):
            continue
        run = parity_run(
            FAMILIES[family],
            LayoutConfig(),
            block_size=BLOCK_SIZES[attention],
            global_batch_size=SEQUENCES,
            micro_batch_size=SEQUENCES // 2,
        )
        run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, random_length_probability=0.0))
        found[f"{family}, {packing}, {attention}"] = run, DOCUMENTS[packing]
    return found


def gradients(run: RunConfig, documents: int) -> Gradients:
    """Loss and gradients of one step of a new model, in this process alone."""
    loss, norm, parts = step_gradients(run, SyntheticWindows(run, documents))
    return Gradients(loss, norm, join_parts(parts))


def reference(part: PartRun) -> None:
    """The CPU's: figures go into the results, gradients into files beside them."""
    folder = _folder(part)
    folder.mkdir(exist_ok=True)
    for name, (run, documents) in cases(part.toy).items():
        part.measure(name, _kept, folder / f"{name}.pt", run, documents)
    part.measure(DEMO, lambda: {"losses": demo_losses(part.toy)})


def compare_local(part: PartRun) -> None:
    """With Megatron's own modules: fp32, and bf16 over packed windows, which torch's own attention and products serve
    that no other part runs."""
    found = cases(part.toy)
    _compare(part, {"fp32": found, "bf16": {name: case for name, case in found.items() if case[1] > 1}})


def compare(part: PartRun) -> None:
    """fp32 and bf16 with the modules that a training would have."""
    _compare(part, {"fp32": cases(part.toy), "bf16": cases(part.toy)})


def _compare(part: PartRun, chosen: dict[str, dict[str, tuple[RunConfig, int]]]) -> None:
    """The `chosen` cases of each precision, and the demo's model over many steps."""
    torch.set_float32_matmul_precision("highest")
    part.expect([f"{name}, {precision}" for precision, found in chosen.items() for name in found] + [DEMO])
    for precision, found in chosen.items():
        for name, (run, documents) in found.items():
            run = dataclasses.replace(run, training=dataclasses.replace(run.training, precision=precision))
            part.measure(f"{name}, {precision}", _difference, _folder(part) / f"{name}.pt", run, documents)
    part.measure(DEMO, demo_difference, part)


def differences(expected: Gradients, found: Gradients) -> dict[str, Any]:
    """How far the two are apart, each relative: the loss, the norm, the worst entry of a gradient, and all together.

    `gradient`: the largest |a - b| / max |a| over the entries of each gradient. `all_gradients`: |a - b| / |a| of all
    entries as one vector. What is not a number is infinitely far.
    """
    error, where = worst(expected, found)
    pairs = [(a.double(), found.tensors[name].double()) for name, a in expected.tensors.items()]
    apart = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    return {
        "worst": error,
        "where": where,
        "loss": abs(found.loss - expected.loss) / abs(expected.loss),
        "norm": abs(found.grad_norm - expected.grad_norm) / expected.grad_norm,
        "all_gradients": apart**0.5 if apart == apart else float("inf"),
        "transformer_engine": int(transformer_engine_active()),
    }


def demo_losses(toy: bool) -> list[float]:
    """The loss of each of the first steps of the demo's model, on synthetic windows, in one process."""
    run = load_run("demo")
    training = run.training
    if toy:
        training = dataclasses.replace(training, sequence_length=32, global_batch_size=4, micro_batch_size=4)
    run = dataclasses.replace(run, layout=LayoutConfig(), training=training)
    models = wrap(run, build_run_chunks(run))
    optimizer = build_optimizer(run, models)
    step = TrainingStep(run, models, optimizer, SyntheticWindows(run, documents=2))
    losses = []
    for number in range(TOY_STEPS if toy else DEMO_STEPS):
        set_learning_rate(run, optimizer, number)
        losses.append(float(step(number).losses.loss))
    return losses


def demo_difference(part: PartRun) -> dict[str, Any]:
    """The losses here against the CPU's."""
    expected = part.results.read().figure("reference", DEMO, "losses")
    if expected is None:
        raise ResourceError(_MISSING)
    found = demo_losses(part.toy)
    relative = [abs(a - b) / a for a, b in zip(expected, found, strict=True)]
    return {
        "worst": largest(relative),
        "first_ten": largest(relative[:10]),
        "first": found[0],
        "last": found[-1],
        "transformer_engine": int(transformer_engine_active()),
    }


def _kept(path: Path, run: RunConfig, documents: int) -> dict[str, float]:
    made = gradients(run, documents)
    torch.save({"loss": made.loss, "norm": made.grad_norm, "tensors": made.tensors}, path)
    return {"loss": made.loss, "norm": made.grad_norm}


def _difference(path: Path, run: RunConfig, documents: int) -> dict[str, Any]:
    if not path.exists():
        raise ResourceError(_MISSING)
    kept = torch.load(path, weights_only=True)
    return differences(Gradients(kept["loss"], kept["norm"], kept["tensors"]), gradients(run, documents))


_MISSING = "the CPU's figures are missing: the part `reference` failed, or its files were removed"


def _folder(part: PartRun) -> Path:
    return part.results.beside("reference")
