"""YAML files to typed configurations, and back.

Relative paths that a run names (data sets, output_dir, checkpoint.load) are relative to the current directory.
A model is named by the stem of a file in a `models` directory, or by the path of a YAML file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llada_megatron.llada_moe.config import source
from llada_megatron.llada_moe.config.parsing import Origins, closest, parse
from llada_megatron.llada_moe.config.schema import ModelConfig, RunConfig
from llada_megatron.llada_moe.config.validation import validate_model, validate_run
from llada_megatron.llada_moe.errors import ConfigError

T = TypeVar("T")
REPOSITORY_MODELS = Path(__file__).resolve().parents[4] / "configs" / "models"
MODELS_BESIDE = ("../models", "models", ".")
"""Where a model named in a file is looked for, relative to that file."""


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
    file = _find_model(str(name_or_path), Path(), "")
    node = _with_overrides(_resolved(source.read_yaml(file), file.parent, (file.resolve(),)), overrides)
    model, origins = parse(ModelConfig, node)
    validate_model(model, origins)
    return model


def is_run(name_or_path: str | Path) -> bool:
    """Whether a YAML file holds a run (it has a `model` key) rather than a model."""
    path = Path(name_or_path)
    return path.is_file() and source.child(source.read_yaml(path), "model") is not None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and scalars (what a manifest stores)."""
    return dataclasses.asdict(config)


def dump_yaml(config: Any) -> str:
    """A configuration as YAML that `load_run` and `load_model` read back unchanged."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The configuration of class `cls` that `to_dict` wrote; keys added since then take their defaults.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of another type.
    """
    return parse(cls, yaml.representer.SafeRepresenter().represent_data(values))[0]


def _read_run(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, Origins]:
    root = source.read_yaml(path)
    whole_model = [text for text in overrides if re.match(r"\s*model\s*=", text)]
    root = _with_overrides(root, whole_model)
    model = source.child(root, "model")
    if model is not None:
        key = next(key for key, _ in root.value if key.value == "model")
        resolved = _resolved(model, path.parent, ())
        root = yaml.MappingNode(root.tag, [(k, resolved if k is key else v) for k, v in root.value], root.start_mark)
    return parse(RunConfig, _with_overrides(root, [text for text in overrides if text not in whole_model]))


def _with_overrides(root: yaml.MappingNode, overrides: Sequence[str]) -> yaml.MappingNode:
    for text in overrides:
        root = source.assigned(root, *source.parse_override(text))
    return root


def _resolved(node: yaml.Node, directory: Path, chain: tuple[Path, ...]) -> yaml.Node:
    """A model node with its name, or the `base` it changes, replaced by the content of the file."""
    base = node if isinstance(node, yaml.ScalarNode) else source.child(node, "base")
    if base is None:
        return node
    where = source.location(base.start_mark)
    if not isinstance(base, yaml.ScalarNode) or base.tag == source.NULL_TAG:
        raise ConfigError(f"{where}: expected the name of a model or the path of its YAML file")
    file = _find_model(base.value, directory, where)
    if file.resolve() in chain:
        raise ConfigError(f"{where}: {base.value!r} is its own base")
    content = _resolved(source.read_yaml(file), file.parent, (*chain, file.resolve()))
    return content if node is base else source.merged(content, source.without(node, "base"))


def _find_model(name: str, directory: Path, where: str) -> Path:
    """File of a model: a path (relative to `directory`, then to the current one), or a name in a models directory."""
    if name.endswith((".yaml", ".yml")):
        candidates = [directory / name, Path(name)]
    else:
        folders = [directory / beside for beside in MODELS_BESIDE] + [Path("configs/models"), REPOSITORY_MODELS]
        candidates = [folder / f"{name}.yaml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(
        {file.stem for candidate in candidates for file in candidate.parent.glob("*.yaml")} - {Path(name).stem}
    )
    shipped = sorted(file.stem for file in REPOSITORY_MODELS.glob("*.yaml"))
    listing = f"; models: {', '.join(shipped)}" if shipped else ""
    prefix = f"{where}: " if where else ""
    raise ConfigError(f"{prefix}no model {name!r}{closest(Path(name).stem, known) or listing}")


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    beside = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    raise ConfigError(f"{path}: no such configuration file{closest(str(path), map(str, beside))}")
