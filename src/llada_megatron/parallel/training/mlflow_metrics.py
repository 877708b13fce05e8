"""Metrics for MLflow: `logging.callbacks: [mlflow]`. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are respected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.training.callbacks import MetricsCallback

ID_FILE = "mlflow-id"
"""File in the run's folder with the run's id there, so that a run that goes on continues the same curves."""

_LONGEST_VALUE = 500
"""Characters of a parameter's value that every version of MLflow takes."""


class MlflowMetrics(MetricsCallback):
    """One run of MLflow for a run of ours, over restarts."""

    def start(self, run: RunConfig, first_step: int) -> None:
        """Begin, or continue, the run there; a new one gets the configuration as parameters."""
        import mlflow

        file = Path(run.output_dir) / ID_FILE
        known = file.read_text("utf-8").strip() if first_step and file.is_file() else None
        if known is not None:
            mlflow.start_run(run_id=known)
            return
        begun = mlflow.start_run(run_name=Path(run.output_dir).absolute().name)
        file.write_text(begun.info.run_id, "utf-8")
        mlflow.log_params(dict(_leaves(to_dict(run))))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step; what is not a number is left out, because not every store of MLflow takes it."""
        import mlflow

        mlflow.log_metrics({name: float(value) for name, value in values.items() if math.isfinite(value)}, step=step)

    def end(self) -> None:
        """The run is done."""
        import mlflow

        mlflow.end_run()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)[:_LONGEST_VALUE]
