"""YAML files to typed configurations.

Relative paths that a run names (data sets, output_dir, checkpoint.load) are relative to the current directory.
A run and a model are given as the path of a file or as a name, and so are the model and the recovery policy of a run
(`named.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from llada_megatron.llada_moe.config import optimizer, yaml_nodes
from llada_megatron.llada_moe.config.checks import validate_run
from llada_megatron.llada_moe.config.model import ModelConfig, validate_model
from llada_megatron.llada_moe.config.named import MODELS, RUNS, SECTIONS, SUFFIXES
from llada_megatron.llada_moe.config.parsing import Origins, closest, parse
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError

STEPS = "training.steps"


def load_run(
    name_or_path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda text: None
) -> RunConfig:
    """The validated run in a YAML file or in `configs/runs/NAME.yaml`, with `key.path=value` overrides laid over it.

    An override of `training.steps` by fewer steps than the file's schedule of the learning rate takes scales it, and
    `say` is called with one line about that.

    Raises:
        ConfigError: with file, line, key and what to change, one line per problem. An unknown name lists
            the known ones.
    """
    path = _run_file(name_or_path)
    run, origins = _read_run(path, overrides)
    run = _with_fitting_schedule(run, path, overrides, say)
    validate_run(run, origins)
    return run


def load_model(name_or_path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """The validated model in `configs/models/NAME.yaml` or in a YAML file.

    Raises:
        ConfigError: as `load_run`; an unknown name lists the known ones.
    """
    node = _with_overrides(MODELS.load(str(name_or_path)), overrides)
    model, origins = parse(ModelConfig, node)
    validate_model(model, origins)
    return model


def find_model_and_run(name_or_path: str) -> tuple[Path | None, Path | None]:
    """The file of the model and the file of the run that a name stands for; a path stands for one of the two.

    A file holds a run where it has a `model` key.

    Raises:
        ConfigError: it stands for neither (lists the known names), or a file is not valid YAML.
    """
    path = Path(name_or_path)
    models, runs = ([path], [path]) if path.is_file() else (MODELS.files(name_or_path), RUNS.files(name_or_path))
    model = next((file for file in models if not _is_run(file)), None)
    run = next((file for file in runs if _is_run(file)), None)
    if model is None and run is None:
        names = f"; models: {', '.join(MODELS.names())}; runs: {', '.join(RUNS.names())}"
        near = closest(path.stem, [*MODELS.neighbours(name_or_path), *RUNS.neighbours(name_or_path)])
        raise ConfigError(f"no model or run {name_or_path!r}{near or names}")
    return model, run


def _is_run(path: Path) -> bool:
    return yaml_nodes.child(yaml_nodes.read_yaml(path), "model") is not None


def _read_run(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, Origins]:
    root = yaml_nodes.read_yaml(path)
    whole = [text for text in overrides if re.match(rf"\s*({'|'.join(SECTIONS)})\s*=", text)]
    root = _with_overrides(root, whole)  # a section named anew, before the changes to its keys
    pairs = [
        (key, SECTIONS[key.value].resolved(value, path.parent) if key.value in SECTIONS else value)
        for key, value in root.value
    ]
    root = yaml.MappingNode(root.tag, pairs, root.start_mark)
    return parse(RunConfig, _with_overrides(root, [text for text in overrides if text not in whole]))


def _with_overrides(root: yaml.MappingNode, overrides: Sequence[str]) -> yaml.MappingNode:
    for text in overrides:
        root = yaml_nodes.assigned(root, *yaml_nodes.parse_override(text))
    return root


def _with_fitting_schedule(
    run: RunConfig, path: Path, overrides: Sequence[str], say: Callable[[str], None]
) -> RunConfig:
    """The run, its schedule scaled if it fits the steps in the file and not the fewer ones of an override.

    What does not fit otherwise stays, for validation to refuse.
    """
    rate, steps = run.optimizer.learning_rate, run.training.steps
    keys = [".".join(yaml_nodes.parse_override(text)[0]) for text in overrides]
    scheduled = any(key == "optimizer" or f"{key}.".startswith("optimizer.learning_rate.") for key in keys)
    if STEPS not in keys or scheduled or steps < 1 or optimizer.fits(rate, steps):
        return run
    others = [text for text, key in zip(overrides, keys, strict=True) if key != STEPS]
    try:
        before = _read_run(path, others)[0].training.steps
    except ConfigError:  # the file names no steps
        return run
    if before <= steps or not optimizer.fits(rate, before):
        return run
    changed = optimizer.scaled(rate, before, steps)
    say(
        f"{STEPS}={steps}: the learning rate's schedule is scaled from {before} steps: "
        f"warmup_steps {rate.warmup_steps} to {changed.warmup_steps}, decay_steps {rate.decay_steps} to "
        f"{changed.decay_steps}"
        + "".join(f", the drop at {old.step} to {new.step}" for old, new in zip(rate.drops, changed.drops, strict=True))
    )
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=changed))


def _run_file(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.name == str(name_or_path) and path.suffix not in SUFFIXES:
        if files := RUNS.files(path.name):
            return files[0]
        raise ConfigError(RUNS.unknown(path.name))
    beside = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    raise ConfigError(f"{path}: no such configuration file{closest(str(path), map(str, beside))}")
