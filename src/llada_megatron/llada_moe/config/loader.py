"""YAML files to typed configurations, and back.

Relative paths that a run names (data sets, output_dir, checkpoint.load) are relative to the current directory.
A model and a recovery policy may be named instead of written out (`named.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from llada_megatron.llada_moe.config import yaml_nodes
from llada_megatron.llada_moe.config.model import ModelConfig, validate_model
from llada_megatron.llada_moe.config.named import MODELS, SECTIONS
from llada_megatron.llada_moe.config.parsing import Origins, closest, parse
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.validation import validate_run
from llada_megatron.llada_moe.errors import ConfigError


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated run in a YAML file, with `key.path=value` overrides laid over it.

    Raises:
        ConfigError: with file, line, key and what to change, one line per problem.
    """
    run, origins = _read_run(_existing(Path(path)), overrides)
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


def is_run(name_or_path: str | Path) -> bool:
    """Whether a YAML file holds a run (it has a `model` key) rather than a model."""
    path = Path(name_or_path)
    return path.is_file() and yaml_nodes.child(yaml_nodes.read_yaml(path), "model") is not None


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


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    beside = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    raise ConfigError(f"{path}: no such configuration file{closest(str(path), map(str, beside))}")
