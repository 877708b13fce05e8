"""Whether a token goes to the same experts in the pass of the sampler and in that of training.

Both run the same tokens with the same weights, in products of other shapes and sums of another order. What that does to
a router's scores is measured, and so is how far apart the scores of exchanged experts were: rounding turns near ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.model.head import Targets
from llada_megatron.llada_moe.model.windows import KeyValues, Window, Windows
from llada_megatron.parallel import device, topology
from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
from llada_megatron.parallel.evaluation.routing_record import recorded

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel


@dataclass(frozen=True)
class PassAgreement:
    """One layer's routing in the two passes."""

    rows: int
    differ: float
    """Share of the tokens whose sets of experts differ."""
    replaced: float
    """Mean share of a token's experts that differ."""
    score_difference: float
    """Largest difference of any expert's score between the passes."""
    largest_gap: float
    """Of the tokens that differ, the largest distance between the scores of two experts that were exchanged; 0 if none
    differs. A choice that follows its scores keeps it below twice `score_difference`."""
    usual_gap: float
    """Median over all tokens of the distance between the last expert that was chosen and the first that was not."""


def pass_agreement(loaded: LoadedModel, tokens: NDArray[np.int64]) -> dict[int, PassAgreement]:
    """Agreement of each layer (from 1) on sequences `[batch, seq]`, each one document, masked already (collective).

    With tensor parallelism the training pass needs the weights a second time: Megatron trains experts with sequence
    parallelism only, and the sampler runs without.

    Raises:
        ValueError: the model has no experts.
    """
    inputs = torch.from_numpy(tokens)
    layers, sampled, of_sampled = _recorded(loaded.model, tokens.size, lambda: sampling_pass(loaded, inputs))
    training = loaded
    if loaded.layout.tensor_parallel > 1:
        layout = replace(loaded.layout, sequence_parallel=True)
        training = load_checkpoint(loaded.path, layout, loaded.run.training.precision)
    _, trained, of_trained = _recorded(training.model, tokens.size, lambda: training_pass(training, inputs))
    return {number: _compared(sampled[i], trained[i], of_sampled[i], of_trained[i]) for i, number in enumerate(layers)}


def _recorded(
    model: torch.nn.Module, tokens: int, run: Callable[[], NDArray[np.int64]]
) -> tuple[list[int], NDArray[np.int16], NDArray[np.float32]]:
    """Layers, choices `[layers, tokens, top_k]` and scores `[layers, tokens, experts]` of the passes of `run`, which
    returns the place of each token that it ran, in the text; sequence by sequence."""
    with recorded(model, scores=True) as record:
        order = np.argsort(run())
        return record.layers, record.take(tokens)[:, order], record.take_scores(tokens)[:, order]


def sampling_pass(loaded: LoadedModel, inputs: torch.Tensor) -> NDArray[np.int64]:
    """What the sampler runs: whole sequences packed one after another, or block after block with keys kept, where
    attention is over causal blocks. Returns the place of each token in `inputs` flattened, in the order they ran."""
    batch, length = inputs.shape
    block = loaded.model.pattern.block
    memory = None if block is None else KeyValues(batch, length)
    where, places = device.current(), []
    for first in range(0, length, block or length):
        width = min(block or length, length - first)
        windows = [Window(slot, first, width, first + width) for slot in range(batch)]
        positions = torch.cat([window.positions for window in windows]).to(where)
        packed = Windows(windows, memory, positions, length)
        part = inputs[:, first : first + width].reshape(1, -1).to(where)
        _stages(loaded, part, packed)
        places.append((np.arange(batch)[:, None] * length + np.arange(first, first + width)).ravel())
    return np.concatenate(places)


@torch.no_grad()
def _stages(loaded: LoadedModel, tokens: torch.Tensor, packed: Windows) -> None:
    rows = torch.zeros(tokens.shape, dtype=torch.bool)
    rows[0, 0] = True
    loaded.through_stages(lambda model: model(tokens, packed, rows=rows), *tokens.shape)


def training_pass(loaded: LoadedModel, inputs: torch.Tensor) -> NDArray[np.int64]:
    """The forward pass of a training step; the routers' counts for the bias update are put back. Returns as
    `sampling_pass`: the tokens run position by position, the sequences beside each other."""
    model, here, parts = loaded.model, inputs.to(device.current()), loaded.layout.tensor_parallel
    slices = (topology.coordinates().tensor, parts) if loaded.layout.sequence_parallel else (0, 1)
    targets = Targets.of(inputs, torch.ones(inputs.shape), *slices).to(device.current())
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("local_tokens_per_expert")]
    kept = [buffer.clone() for buffer in counts]
    model.train()
    try:
        with torch.enable_grad():
            loaded.through_stages(lambda stage: stage(here, targets=targets), *inputs.shape)
    finally:
        model.eval()
        for buffer, before in zip(counts, kept, strict=True):
            buffer.copy_(before)
    batch, length = inputs.shape
    return np.arange(batch * length).reshape(batch, length).T.ravel()


def _compared(
    a: NDArray[np.int16], b: NDArray[np.int16], score_a: NDArray[np.float32], score_b: NDArray[np.float32]
) -> PassAgreement:
    in_b = (a[:, :, None] == b[:, None, :]).any(axis=2)
    in_a = (b[:, :, None] == a[:, None, :]).any(axis=2)
    differ = ~in_b.all(axis=1)
    of_a = np.take_along_axis(score_a, a.astype(np.int64), axis=1)
    left = np.where(in_b, np.inf, of_a).min(axis=1)
    came = np.where(in_a, -np.inf, np.take_along_axis(score_a, b.astype(np.int64), axis=1)).max(axis=1)
    others = score_a.copy()
    np.put_along_axis(others, a.astype(np.int64), -np.inf, axis=1)
    return PassAgreement(
        rows=len(a),
        differ=float(differ.mean()),
        replaced=float(1 - in_b.mean()),
        score_difference=float(np.abs(score_a - score_b).max()),
        largest_gap=float((left - came)[differ].max()) if differ.any() else 0.0,
        usual_gap=float(np.median(of_a.min(axis=1) - others.max(axis=1))) if a.shape[1] < score_a.shape[1] else 0.0,
    )
