"""YAML text to nodes that remember where they stand, before any type is known.

PyYAML's `compose` gives nodes with file, line and column and does not yet turn text into values, so its surprises
(`no` is a boolean, `010` is eight, `1e-4` is text, the last duplicate wins) cannot happen here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from llada_megatron.llada_moe.errors import ConfigError

YAML_TAG = "tag:yaml.org,2002:"

NULL_TAG = YAML_TAG + "null"

STRING_TAG = YAML_TAG + "str"

PLAIN_TAGS = frozenset(
    YAML_TAG + kind for kind in ("null", "bool", "int", "float", "str", "timestamp", "map", "seq", "merge", "value")
)


MAX_BYTES = 2**20
"""Size of a configuration file above which it is not read: those of this project have a few kilobytes."""

MAX_NODES = 50_000
"""Values of a configuration, with each alias counted as all that it stands for."""

_MAX_DEPTH = 50

_TOO_MANY = f"more than {MAX_NODES:,} values, which no configuration has; are there aliases of aliases?"

_TOO_DEEP = "mappings and lists are nested deeper than any configuration"


class _Override(str):
    """Name of a source that is an override of the command line: it has no lines."""


def display(path: Path) -> str:
    """`path` as a message shows it: relative to the current directory where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def location(mark: yaml.Mark | None) -> str:
    """Where a node stands: `file:line`, or the override that gave it; empty for values that came from no text."""
    if mark is None:
        return ""
    return str(mark.name) if isinstance(mark.name, _Override) else f"{mark.name}:{mark.line + 1}"


def read_yaml(path: Path) -> yaml.MappingNode:
    """The top mapping of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not one mapping, or repeats a key.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{display(path)}: {path.stat().st_size:,} bytes are too many for a configuration file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{display(path)}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"{display(path)}: cannot read the configuration: {error.strerror}") from None
    root = _compose(text, display(path))
    if root is None:
        raise ConfigError(f"{display(path)}: the file is empty; it must hold `key: value` lines")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{location(root.start_mark)}: expected `key: value` lines at the top of the file")
    return root


def parse_override(text: str) -> tuple[list[str], yaml.Node]:
    """`key.path=value` as (keys, value node); the value is YAML, an empty one is null.

    Raises:
        ConfigError: there is no `=`, a key is empty, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or len(keys) > _MAX_DEPTH:
        raise ConfigError(f"override {text[:200]!r}: write it as key.path=value, for example layout.tensor_parallel=2")
    name = _Override(f"override {text}")
    mark = yaml.Mark(name, 0, 0, 0, None, 0)
    return keys, _compose(value, name) or yaml.ScalarNode(NULL_TAG, "", mark, mark)


def assigned(node: yaml.Node | None, keys: list[str], value: yaml.Node) -> yaml.Node:
    """A copy of `node` with `value` at the path `keys`; a number in the path selects an item of a list."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(node, yaml.SequenceNode):
        if not head.isdecimal() or len(head) > 9 or int(head) >= len(node.value):
            raise ConfigError(
                f"{location(value.start_mark)}: {head!r} is not an item of this list (0 to {len(node.value) - 1})"
            )
        items = [assigned(item, rest, value) if i == int(head) else item for i, item in enumerate(node.value)]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    pairs = list(node.value) if isinstance(node, yaml.MappingNode) else []
    key_node = yaml.ScalarNode(STRING_TAG, head, value.start_mark, value.end_mark)
    for i, (existing, child) in enumerate(pairs):
        if existing.value == head:
            pairs[i] = (key_node if not rest else existing, assigned(child, rest, value))
            break
    else:
        pairs.append((key_node, assigned(None, rest, value)))
    mark = node.start_mark if node is not None else value.start_mark
    return yaml.MappingNode(YAML_TAG + "map", pairs, mark, mark)


def merged(base: yaml.MappingNode, changes: yaml.MappingNode) -> yaml.MappingNode:
    """`base` with the keys of `changes` laid over it, mapping by mapping."""
    pairs = {key.value: (key, value) for key, value in base.value}
    for key, value in changes.value:
        below = pairs.get(key.value)
        if below and isinstance(below[1], yaml.MappingNode) and isinstance(value, yaml.MappingNode):
            value = merged(below[1], value)
        pairs[key.value] = (key, value)
    return yaml.MappingNode(base.tag, list(pairs.values()), changes.start_mark, changes.end_mark)


def child(node: yaml.Node, name: str) -> yaml.Node | None:
    """The value under the key `name` of a mapping node."""
    return (
        next((value for key, value in node.value if key.value == name), None)
        if isinstance(node, yaml.MappingNode)
        else None
    )


def without(node: yaml.MappingNode, name: str) -> yaml.MappingNode:
    """A copy of a mapping node without one key."""
    pairs = [(key, value) for key, value in node.value if key.value != name]
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = yaml.SafeLoader(text)
        loader.name = name
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        column = "" if isinstance(name, _Override) else f":{mark.column + 1}"
        raise ConfigError(f"{location(mark)}{column}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = "" if isinstance(name, _Override) else f":{text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(f"{name}{line}: not valid YAML: it holds the character {text[error.position]!r}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: {_TOO_DEEP}") from None
    if node is not None:
        _check(node, (), iter(range(MAX_NODES)))
    return node


def _check(node: yaml.Node, ancestors: tuple[yaml.Node, ...], left: Iterator[int]) -> None:
    """Refuse what YAML allows and a configuration cannot mean: repeated keys, tags, a node inside itself.

    `left` is taken one item from for each node, and refuses the one after its end.
    """
    where = location(node.start_mark)
    if next(left, None) is None:
        raise ConfigError(f"{where}: {_TOO_MANY}")
    if len(ancestors) > _MAX_DEPTH:
        raise ConfigError(f"{where}: {_TOO_DEEP}")
    if any(node is ancestor for ancestor in ancestors):
        raise ConfigError(f"{where}: an alias refers to the mapping or list that contains it")
    if node.tag not in PLAIN_TAGS:
        raise ConfigError(
            f"{where}: YAML tags such as {node.tag.replace(YAML_TAG, '!!')} are not supported; write the plain value"
        )
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, (*ancestors, node), left)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, str] = {}
        for key, value in node.value:
            here = location(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{here}: a key must be a single word")
            if key.value in seen:
                raise ConfigError(f"{here}: key {key.value!r} is given twice (first at {seen[key.value]}); keep one")
            seen[key.value] = here
            _check(value, (*ancestors, node), left)
