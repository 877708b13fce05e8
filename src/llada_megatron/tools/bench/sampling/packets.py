"""Bytes that leave a rank for a row of logits and a step, counted on ranks that hold shards of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel.ranks import run_ranks
from llada_megatron.tools.bench.sampling.contenders import Candidate, fitted

LAYOUTS = {"TP2": LayoutConfig(tensor_parallel=2), "TP2.PP2": LayoutConfig(tensor_parallel=2, pipeline_parallel=2)}
_TEMPERATURES = (0.0, 1.0)
_NEW_TOKENS, _TIMEOUT_S = 8, 600.0


def bytes_per_row(
    paths: dict[str, Path], entries: Sequence[Candidate], layout: LayoutConfig
) -> dict[tuple[str, float], int]:
    """Of each entry's name and temperature (0 and 1) the most that left any rank of `layout`.

    Args:
        paths: of the models, by their attention.
        entries: presets that can run on them.
        layout: how the models are spread.
    """
    ranks = run_ranks(_count, layout.world_size, paths, list(entries), layout, timeout=_TIMEOUT_S)
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _count(paths: dict[str, Path], entries: list[Candidate], layout: LayoutConfig) -> dict[tuple[str, float], int]:
    """On a rank: write a few tokens with each of them at each temperature."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(layout, 0)
    models = {name: load_checkpoint(path, layout) for name, path in paths.items()}
    counted = {}
    for entry in entries:
        loaded = models[entry.attention]
        choice = fitted(entry.preset, loaded)
        drafts = [continuation([0, 1, 2], _NEW_TOKENS, choice.block_length, 0, choice.grid)]
        for temperature in _TEMPERATURES:
            writer = SequenceGenerator(loaded, choice.method(temperature=temperature), batch_size=1)
            for _ in writer.steps(drafts):
                pass
            counted[entry.name, temperature] = writer.report.bytes_per_row
    return counted
