"""Nodes to dataclasses and back: every key known, every value of its declared type, every problem with its place."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import yaml

from llada_megatron.llada_moe.config.yaml_nodes import NULL_TAG, location
from llada_megatron.llada_moe.errors import ConfigError

INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")

NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

TRUTH_WORDS = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "1": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "0": "false",
}

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line breaks, and what is no character at all."""

ScriptText = typing.NewType("ScriptText", str)
"""Text that may have several lines, with tabs."""

LARGEST_INTEGER = 2**63 - 1

_SHOWN = 80

_FAILED = object()

VARIANTS: dict[type, Callable[[dict[str, str]], type]] = {}
"""Dataclasses whose keys depend on a value: from the scalars of a mapping to the class that holds its keys."""


class Origins:
    """Where each key of a configuration was written, by its dotted path."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def record(self, path: str, place: str) -> None:
        """Remember that the key `path` stands at `place`."""
        self._places[path] = place

    def where(self, path: str) -> str:
        """Place of `path`, or of the closest mapping around it when the key was left to its default."""
        while path and path not in self._places:
            path = path.rpartition(".")[0]
        return self._places.get(path, "")


class Problems:
    """Everything that is wrong with a configuration, so that one run of the command shows all of it."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, place: str, key: str, message: str) -> None:
        """Note that `key`, which stands at `place`, is wrong."""
        self._lines.append(": ".join(part for part in (place, key, message) if part))

    def raise_if_any(self) -> None:
        """Raises: ConfigError: with one line per problem."""
        if self._lines:
            raise ConfigError("\n".join(dict.fromkeys(self._lines)))


def closest(word: str, choices: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice spelt most like `word`, or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse(cls: type, node: yaml.Node) -> tuple[Any, Origins]:
    """An instance of the dataclass `cls` from a node tree, and where each of its keys was written.

    Raises:
        ConfigError: naming each unknown or missing key and each value of a wrong type.
    """
    parser = _Parser(cls)
    value = parser.value(cls, node, "", location(node.start_mark))
    parser.problems.raise_if_any()
    return value, parser.origins


def fields_of(cls: type) -> dict[str, Any]:
    """Name and resolved type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def key_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a dataclass understands."""
    for name, hint in fields_of(cls).items():
        yield prefix + name
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if inner is not None:
            yield from key_paths(inner, f"{prefix}{name}.")


class _Parser:
    def __init__(self, root: type) -> None:
        self.root, self.problems, self.origins = root, Problems(), Origins()

    def value(self, hint: Any, node: yaml.Node, path: str, place: str) -> Any:
        """`node` as a value of the type `hint`; _FAILED, with the problem noted, when it is not one."""
        self.origins.record(path, place)
        if dataclasses.is_dataclass(hint):
            return self._mapping(hint, node, path, place)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if node.tag == NULL_TAG and type(None) in arguments:
                return None
            return self.value(_fitting([part for part in arguments if part is not type(None)], node), node, path, place)
        if origin is list:
            return self._list(arguments[0], node, path, place)
        try:
            return _choice(arguments, node) if origin is typing.Literal else _SCALARS[hint](node)
        except ValueError as error:
            self.problems.add(place, path, str(error))
            return _FAILED

    def _mapping(self, cls: type, node: yaml.Node, path: str, place: str) -> Any:
        if cls in VARIANTS and isinstance(node, yaml.MappingNode):
            cls = VARIANTS[cls]({key.value: child.value for key, child in node.value if _is_scalar(child)})
        fields, prefix = fields_of(cls), f"{path}." if path else ""
        if not isinstance(node, yaml.MappingNode):
            self.problems.add(
                place, path, f"expected a mapping with the keys {', '.join(fields)}, found {_describe(node)}"
            )
            return _FAILED
        values = {}
        for key, child in node.value:
            here = location(key.start_mark)
            if key.value in fields:
                values[key.value] = self.value(fields[key.value], child, prefix + key.value, here)
            else:
                self.problems.add(here, prefix + key.value, "unknown key" + self._suggestion(key.value, list(fields)))
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        for name in missing:
            self.problems.add(place, prefix + name, "missing; this key is required")
        return _FAILED if missing or _FAILED in values.values() else cls(**values)

    def _suggestion(self, key: str, siblings: list[str]) -> str:
        near = closest(key, siblings)
        if near:
            return near
        elsewhere = [path for path in key_paths(self.root) if path.rpartition(".")[2] == key]
        return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known keys here: {', '.join(siblings)}"

    def _list(self, hint: Any, node: yaml.Node, path: str, place: str) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            self.problems.add(place, path, f"expected a list (lines that begin with `- `), found {_describe(node)}")
            return _FAILED
        items = [self.value(hint, item, f"{path}.{i}", location(item.start_mark)) for i, item in enumerate(node.value)]
        return _FAILED if _FAILED in items else items


def _fitting(hints: list[Any], node: yaml.Node) -> Any:
    """Of several types the one that a node is written as; the last where it is none of them."""

    def fits(hint: Any) -> bool:
        if typing.get_origin(hint) is list:
            return isinstance(node, yaml.SequenceNode)
        return _is_scalar(node) and (hint is not int or (not node.style and INTEGER.fullmatch(node.value) is not None))

    return next(filter(fits, hints), hints[-1])


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if node.tag == NULL_TAG else _shown(node.value)


def _shown(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]}")


def _text(node: yaml.Node, expected: str, quoted: bool = False) -> str:
    """The text of a scalar node; quotes around it are refused where a number or a truth value is expected."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL_TAG:
        raise ValueError(f"expected {expected}, found {_describe(node)}")
    if node.style and not quoted:
        raise ValueError(f"expected {expected}, found the quoted text {_shown(node.value)}; remove the quotes")
    return node.value


def _string(node: yaml.Node) -> str:
    text = _text(node, "text", quoted=True)
    if (found := UNPRINTABLE.search(text)) is not None:
        raise ValueError(f"expected one line of text, found the character {found[0]!r} in {_shown(text)}; remove it")
    return text


def _script_text(node: yaml.Node) -> str:
    text = _text(node, "text", quoted=True)
    if (found := UNPRINTABLE.search(text.replace("\n", "").replace("\t", ""))) is not None:
        raise ValueError(f"expected lines of shell, found the character {found[0]!r} in {_shown(text)}; remove it")
    return text


def _boolean(node: yaml.Node) -> bool:
    text = _text(node, "true or false")
    if text not in ("true", "false"):
        meant = TRUTH_WORDS.get(text.lower(), text.lower())
        hint = f"; write {meant}" if meant in ("true", "false") else ""
        raise ValueError(f"expected true or false, found {_shown(text)}{hint}")
    return text == "true"


def _integer(node: yaml.Node) -> int:
    text = _text(node, "a whole number")
    if INTEGER.fullmatch(text):
        if len(text) < _SHOWN and abs(value := int(text)) <= LARGEST_INTEGER:
            return value
        raise ValueError(f"{_shown(text)} is too large: the largest whole number is {LARGEST_INTEGER}")
    whole = float(text) if NUMBER.fullmatch(text) else math.nan
    hint = f"; write {int(whole)}" if abs(whole) <= LARGEST_INTEGER and whole == int(whole) else ""
    raise ValueError(f"expected a whole number, found {_shown(text)}{hint}")


def _float(node: yaml.Node) -> float:
    text = _text(node, "a number")
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number such as 0.1 or 1e-4, found {_shown(text)}")
    return value


def _choice(choices: tuple[str, ...], node: yaml.Node) -> str:
    expected = "one of " + ", ".join(choices)
    text = _text(node, expected, quoted=True)
    if text not in choices:
        raise ValueError(f"expected {expected}, found {_shown(text)}{closest(text[:_SHOWN], choices)}")
    return text


_SCALARS = {bool: _boolean, int: _integer, float: _float, str: _string, ScriptText: _script_text}

T = TypeVar("T")


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


Refuse = Callable[[str, str], None]
"""Notes that a dotted key is wrong, and why."""


def require_positive(values: dict[str, float], refuse: Refuse) -> None:
    """Refuse each key whose value is zero or negative."""
    for key, value in values.items():
        if value <= 0:
            refuse(key, f"{value} must be greater than 0")


def collector(origins: Origins | None) -> tuple[Refuse, Problems]:
    """What notes that a key is wrong, at the place where it was written, and what raises all that was noted."""
    problems, places = Problems(), origins or Origins()
    return lambda key, message: problems.add(places.where(key), key, message), problems
