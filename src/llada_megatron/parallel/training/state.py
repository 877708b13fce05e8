"""What of a run survives it: weights, optimizer, how far it has come, what its objective and its recovery
policy remember.

Saved, resharded and resumed here only.

The data position, the masks and the learning rate are functions of the step, so the step number is their state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from llada_megatron import __version__
from llada_megatron.llada_moe.config import from_dict, to_dict
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.set_manifest import SetManifest
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.llada_moe.evaluation.likelihood import Likelihood
from llada_megatron.llada_moe.model import lora
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.objectives import Objective, make_objective
from llada_megatron.parallel.build import build_chunks, transformer_config
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from llada_megatron.parallel.checkpoint.search import (
    described,
    factors_of,
    find_checkpoints,
    first_whole,
    require_model,
)
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.fp8 import fp8_state, fp8_weights
from llada_megatron.parallel.overlap import complete_weights
from llada_megatron.parallel.sharded_state import base_state, load_model_state, model_state
from llada_megatron.parallel.training.distributed_optimizer import load_optimizer_state, optimizer_state
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.parallel.training.run_folder import tokenizer_facts

FROZEN = (
    "training.global_batch_size",
    "training.sequence_length",
    "training.seed",
    "training.precision",
    "objective",
    "data.sets",
    "data.validation_fraction",
    "data.isolate_documents",
)
"""Keys that a resumed run must keep: they decide which samples and masks a step number stands for."""

TRAINED = ("training.lora", "training.frozen")
"""Keys that a resumed run must keep, since the optimizer's state is of the weights that they choose."""


@dataclass
class RunState:
    """What is trained, the number of steps done, and the history of losses and recovery decisions."""

    run: RunConfig
    objective: Objective
    chunks: list[DiffusionTransformer]
    optimizer: MegatronOptimizer
    manifests: list[SetManifest]
    step: int = 0
    history: History = field(default_factory=History)
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation, with the `step` after which it was; empty = none yet. JSON values."""
    remarks: list[str] = field(default_factory=list)
    """What a person should know of the checkpoint that the run goes on from."""

    def save(self, store: CheckpointStore) -> None:
        """Write a checkpoint of this step (collective)."""
        complete_weights(self.optimizer.model_chunks)
        model = model_state(self.chunks)
        optimizer = {"optimizer": optimizer_state(self.optimizer, model, loading=False)}
        scaling = {fp8_state.KEY: fp8_state.scaling_state(self.chunks)}
        store.save(self.step, self._in_high_precision(model) | optimizer | scaling, self._metadata())

    def validated(self, result: Likelihood) -> None:
        """Take note of what these weights cost on held-out text; the checkpoint of the same step keeps it."""
        self.validation = {
            "step": self.step,
            "nats_per_token": result.nats_per_token,
            "pattern": str(self.objective.pattern(self.step - 1)),
        }

    def resume(self, store: CheckpointStore) -> Path | None:
        """Continue from the newest whole checkpoint of this run; None if there is none (collective).

        Raises:
            ConfigError: the run's configuration changed where the meaning of a step depends on it.
            CheckpointError: no checkpoint is usable, or it is of another model.
        """
        path = store.latest(check=check_facts)
        if path is not None:
            self.continue_from(store, path)
        return path

    def continue_from(self, store: CheckpointStore, path: Path) -> None:
        """Continue from a checkpoint of this run; recovery decisions taken since then stay known (collective).

        Raises:
            ConfigError, CheckpointError: as `resume`.
        """
        saved = store.metadata(path)
        require_model(path, saved, self.run.model)
        refuse_changed_run(path, saved, self.run)
        self._require_tokenizer(path, saved)
        self._require_sets(path, saved)
        model = model_state(self.chunks)
        template = self._in_high_precision(model) | {"optimizer": optimizer_state(self.optimizer, model, loading=True)}
        history = self._saved_history(path, saved)
        if history is not None:
            template |= {fp8_state.KEY: fp8_state.scaling_state(self.chunks, history)}
        state, metadata = store.load(path, template)
        load_model_state(self.chunks, state)
        load_optimizer_state(self.optimizer, model_state(self.chunks), state["optimizer"])
        if history is not None:
            fp8_state.load_scaling_state(self.chunks, state[fp8_state.KEY])
        else:
            fp8_state.reset(self.chunks)
        self.step = int(metadata["step"])
        self.objective.load_state(metadata.get("objective", {}))
        known, self.history = self.history.decisions, from_dict(History, metadata.get("recovery", {}))
        self.history.learn(known)

    def _saved_history(self, path: Path, saved: dict[str, Any]) -> int | None:
        """Steps of maxima that FP8's delayed scaling finds in a checkpoint; None where there are none, or no such FP8.

        A remark is made where the run would have needed them.
        """
        fp8 = self.run.training.fp8
        if fp8 is None or fp8.recipe != "delayed":
            return None
        before = saved["run"]["training"].get("fp8")
        if before is not None and before["recipe"] == "delayed":
            return int(before["amax_history_length"])
        how = "in bf16" if before is None else f"with FP8 recipe {before['recipe']}"
        self.remarks.append(f"{path} was trained {how} and has no scales of FP8 recipe delayed: they begin anew")
        return None

    def _in_high_precision(self, model: dict[str, Any]) -> dict[str, Any]:
        """The sharded weights `model`, or where some are kept in FP8, all of them in the training's precision."""
        fp8 = self.run.training.fp8
        if fp8 is None or not fp8.param_gather:
            return model
        with fp8_weights.in_high_precision(self.chunks):
            return model_state(self.chunks)

    def load_weights(self, store: CheckpointStore, path: Path) -> None:
        """Start from the weights of another run's step directory, with a fresh optimizer (collective).

        Low-rank factors begin anew, unless that run had the same.

        Raises:
            CheckpointError: it holds another model, or factors that this run does not have.
        """
        saved = store.metadata(path)
        require_model(path, saved, self.run.model, weights_only=True)
        factors = factors_of(path, saved)
        if factors is not None and factors != self.run.training.lora:
            raise CheckpointError(
                f"{path} holds low-rank factors ({factors}) that this run does not have ({self.run.training.lora}); "
                "merge them first (`llada convert export`, then `llada convert import`), or set training.lora as it was"
            )
        template = model_state(self.chunks)
        state, metadata = store.load(path, template if factors is not None else base_state(template))
        self._require_tokenizer(path, metadata)
        load_model_state(self.chunks, state)
        self.optimizer.reload_model_params()

    def _require_tokenizer(self, path: Path, metadata: dict[str, Any]) -> None:
        if metadata["tokenizer"] is None:  # imported without tokenizer files
            return
        saved, present = metadata["tokenizer"]["sha256"], self.manifests[0].tokenizer.sha256
        if saved != present:
            raise CheckpointError(
                f"{path} was trained on data prepared with another tokenizer ({saved[:12]}, not {present[:12]}); "
                "prepare the data with the tokenizer of that run (llada prepare --tokenizer)"
            )

    def _require_sets(self, path: Path, metadata: dict[str, Any]) -> None:
        """The prepared sets are those that the run began with, where both have digests to tell."""
        saved = metadata.get("sets", {})
        for name, present in self._sets().items():
            if saved.get(name, present) != present:
                raise CheckpointError(
                    f"{path} was trained on another set than {name} is now ({saved[name][:12]}, not "
                    f"{present[:12] if present else 'one of an earlier version'}): it was prepared again or replaced "
                    "since then. Put the old files back, or start a new run: set another output_dir and "
                    f"checkpoint.load={path} to begin from these weights"
                )

    def _sets(self) -> dict[str, str | None]:
        """The digest of each prepared set."""
        names = [entry.path for entry in self.run.data.sets]
        return {name: manifest.sha256 for name, manifest in zip(names, self.manifests, strict=False)}

    def _metadata(self) -> dict[str, Any]:
        return {
            "model": to_dict(self.run.model),
            "run": to_dict(self.run),
            "step": self.step,
            "consumed_samples": self.step * self.run.training.global_batch_size,
            "recovery": to_dict(self.history),
            "objective": self.objective.state(),
            **({"validation": self.validation} if self.validation.get("step") == self.step else {}),
            "layout": to_dict(self.run.layout),
            "versions": {
                "llada-megatron": __version__,
                "torch": torch.__version__,
                "megatron-core": version("megatron-core"),
            },
            "sets": {name: digest for name, digest in self._sets().items() if digest},
            "tokenizer": tokenizer_facts(self.run, self.manifests[0].tokenizer),
        }


def load_frozen(run: RunConfig, store: CheckpointStore, path: str) -> list[torch.nn.Module]:
    """The chunks of a model that an objective reads and does not train, under the run's layout, without FP8
    (collective).

    Raises:
        CheckpointError: there is no whole checkpoint, or it is of another architecture than the run's model.
    """

    def load(found: Path) -> list[torch.nn.Module]:
        require_model(found, store.metadata(found), run.model, weights_only=True)
        pattern = make_objective(run.objective, run.training).pattern(step=0)
        factors = factors_of(found, store.metadata(found))
        training = replace(run.training.without_fp8(), lora=factors, frozen=[])
        config = transformer_config(run.model, run.layout, training)
        chunks = build_chunks(run.model, run.layout, config, pattern, run.training.logits_chunk_mb, factors)
        load_model_state(chunks, store.load(found, model_state(chunks))[0])
        lora.merge(chunks)
        return [chunk.eval().requires_grad_(False) for chunk in chunks]

    return first_whole(find_checkpoints(path), load, logging.getLogger(__name__).warning)


def check_facts(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check that metadata have what training goes on from, each of its type.

    Raises:
        DamagedCheckpointError: naming what is missing or of another type.
    """
    described(ModelConfig, path, metadata, "model")
    if "recovery" in metadata:
        described(History, path, metadata, "recovery")
    try:
        for key in FROZEN:
            _at(metadata["run"], key)
        int(metadata["step"])
        if metadata["run"]["training"].get("fp8") is not None:
            described(FP8Config, path, metadata["run"]["training"], "fp8")
        factors_of(path, metadata)
        if metadata["tokenizer"] is not None:
            metadata["tokenizer"]["sha256"].lower()
    except (LookupError, TypeError, AttributeError) as error:
        fault = f"its manifest lacks what training goes on from ({type(error).__name__}: {error})"
        raise DamagedCheckpointError(f"{path}: {fault}") from error


def refuse_changed_run(path: Path, metadata: dict[str, Any], run: RunConfig) -> None:
    """Refuse to continue `path` under a configuration in which its step number means other samples.

    Raises:
        ConfigError: names each changed key, what it was and what it is.
    """
    present = to_dict(run)
    # a key that is newer than the checkpoint had its default value there
    saved = metadata["run"] | {
        "objective": _with_defaults(metadata["run"]["objective"]),
        "training": {"lora": None, "frozen": []} | metadata["run"]["training"],
    }
    changes = [change for key in FROZEN + TRAINED for change in _changes(key, _at(saved, key), _at(present, key))]
    if changes:
        raise ConfigError(
            f"this run cannot continue {path}: {'; '.join(changes)}. Put the old values back, or start a "
            f"new run: set another output_dir and checkpoint.load={path} to begin from these weights"
        )


def _with_defaults(objective: dict[str, Any]) -> dict[str, Any]:
    """The saved keys of an objective and those of its kind, at every depth, that are newer."""
    try:
        return to_dict(from_dict(ObjectiveConfig, objective))
    except ConfigError:  # it has keys that are not known here, and each is named as a change
        return to_dict(ObjectiveConfig()) | objective


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _changes(key: str, saved: Any, present: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(present, dict):
        return [change for name in saved for change in _changes(f"{key}.{name}", saved[name], present.get(name))]
    return [] if saved == present else [f"{key} was {saved!r} and is {present!r}"]
