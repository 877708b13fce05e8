"""A callback that prints the loss of every reported step: PYTHONPATH=examples, and this in the run file:

logging: {callbacks: ["print_metrics:PrintLoss"]}
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.training.callbacks import MetricsCallback


class PrintLoss(MetricsCallback):
    """Prints to the terminal of rank 0; standard output is the rank's log file."""

    def start(self, run: RunConfig, first_step: int) -> None:
        """Say what is followed."""
        print(f"following {run.output_dir} from step {first_step}", file=sys.stderr)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line a step."""
        print(f"step {step}: loss {values.get('loss', float('nan')):.4f}", file=sys.stderr)
