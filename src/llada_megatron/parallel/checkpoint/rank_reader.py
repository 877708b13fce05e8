"""One rank's part of reading a checkpoint: what several data-parallel ranks hold is read by one of them.

A weight that all data-parallel ranks hold would otherwise be read from the file system by each of them: at 64 ranks, 64
times. They share the reading out, and the one that has read a weight sends it to the others (Megatron's
FullyParallelLoadStrategyWrapper).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy


def read(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What `directory` holds for the template `state`, which cannot be used afterwards (collective over the world)."""
    strategy: Any = TorchDistLoadShardedStrategy()
    if parallel_state.model_parallel_is_initialized():
        holders = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if holders.size() > 1:
            strategy = FullyParallelLoadStrategyWrapper(strategy, holders)
    return dist_checkpointing.load(state, str(directory), sharded_strategy=strategy)
