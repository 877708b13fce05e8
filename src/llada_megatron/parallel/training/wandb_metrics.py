"""Metrics for Weights & Biases: `logging.callbacks: [wandb]`. WANDB_PROJECT, WANDB_MODE and the like are respected."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.training.callbacks import MetricsCallback

ID_FILE = "wandb-id"
"""File in the run's folder with the run's id there, so that a run that goes on continues the same curves."""


class WandbMetrics(MetricsCallback):
    """One run of Weights & Biases for a run of ours, over restarts."""

    _run: Any

    def start(self, run: RunConfig, first_step: int) -> None:
        """Begin, or continue, the run there."""
        import wandb

        folder = Path(run.output_dir).absolute()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llada-megatron"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=_id(folder / ID_FILE, anew=first_step == 0),
            resume="allow",
            dir=str(folder),
            config=to_dict(run),
        )
        # Steps may be reported again after a restart or a bad step, and W&B's own counter only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step."""
        self._run.log({"step": step, **values})

    def end(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def _id(path: Path, anew: bool) -> str:
    """The run's id in the file, which is made where there is none, or for a new run."""
    if anew or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12], "utf-8")
    return path.read_text("utf-8").strip()
