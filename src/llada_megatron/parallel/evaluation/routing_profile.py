"""The routing trace of a loaded model on windows of text, each masked at every ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace
from llada_megatron.llada_moe.evaluation.text_windows import TextWindow, draw_mask, window_facts
from llada_megatron.parallel import device
from llada_megatron.parallel.evaluation.routing_record import recorded

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

_BATCH = 8
"""Windows of one pass."""


def routing_trace(
    loaded: LoadedModel,
    windows: Sequence[TextWindow],
    ratios: Sequence[float],
    sources: Sequence[str],
    block_size: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda windows: None,
) -> RoutingTrace:
    """Run every window once at every ratio, with masks that depend on seed, window and ratio alone (collective: every
    rank gives the same arguments and gets the same trace).

    Args:
        windows: of equal length.
        advance: told of the windows of each pass.

    Raises:
        ValueError: the model has no experts.
    """
    choices, facts = [], []
    with recorded(loaded.model) as record:
        for index, ratio in enumerate(ratios):
            for start in range(0, len(windows), _BATCH):
                batch = windows[start : start + _BATCH]
                numbers = range(start, start + len(batch))
                masked = np.stack([draw_mask(len(batch[0].tokens), ratio, (seed, index, n)) for n in numbers])
                _run(loaded, batch, masked)
                choices.append(_by_sequence(record.take(masked.size), len(batch)))
                facts += [
                    window_facts(window, mask, index, block_size, index * len(windows) + number)
                    for number, window, mask in zip(numbers, batch, masked, strict=True)
                ]
                advance(len(batch))
    columns = [np.concatenate(column) for column in zip(*facts, strict=True)]
    ratio_of, masked, tokens, position, block, source, window_of = columns
    return RoutingTrace(
        layers=record.layers,
        experts=loaded.model.config.num_moe_experts,
        choices=np.concatenate(choices, axis=1),
        ratios=list(ratios),
        ratio=ratio_of,
        masked=masked,
        tokens=tokens,
        position=position,
        block=block,
        block_size=block_size,
        window=window_of,
        sources=list(sources),
        source=source,
    )


def routing_scores(
    loaded: LoadedModel, windows: Sequence[TextWindow], ratios: Sequence[float], rows: int, seed: int = 0
) -> NDArray[np.float32]:
    """Scores by which the routers rank the experts, `[layers, rows, experts]`: of up to `rows` tokens, each window at
    another ratio, and windows more than once only where there are too few."""
    length = len(windows[0].tokens)
    rounds = [(n, (n + turn) % len(ratios)) for turn in range(len(ratios)) for n in range(len(windows))]
    pairs = rounds[: max(1, rows // length)]
    with recorded(loaded.model, scores=True) as record:
        for number, index in pairs:
            masked = draw_mask(length, ratios[index], (seed, index, number))
            _run(loaded, [windows[number]], masked[None])
        return record.take_scores(length * len(pairs))


def _run(loaded: LoadedModel, batch: Sequence[TextWindow], masked: NDArray[np.bool_]) -> None:
    """One evaluation pass over whole sequences, masked as `[batch, seq]` says."""
    inputs = np.where(masked, loaded.run.model.mask_token_id, np.stack([window.tokens for window in batch]))
    length = inputs.shape[1]
    ends = np.concatenate([[0], *(w.boundaries[1:] + number * length for number, w in enumerate(batch))])
    bounds, tokens = torch.from_numpy(ends.astype(np.int32)), torch.from_numpy(inputs).to(device.current())
    rows = torch.zeros(inputs.shape, dtype=torch.bool)
    rows[0, 0] = True  # the logits are of no interest, and none at all would be an empty product
    with torch.no_grad():
        loaded.through_stages(lambda model: model(tokens, bounds, rows=rows), *inputs.shape)


def _by_sequence(chosen: NDArray[np.int16], batch: int) -> NDArray[np.int16]:
    """Choices `[layers, seq * batch, top_k]`, which come position by position, sequence by sequence."""
    layers, tokens, top_k = chosen.shape
    return chosen.reshape(layers, tokens // batch, batch, top_k).swapaxes(1, 2).reshape(layers, tokens, top_k)
