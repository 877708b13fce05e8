"""What each key of a configuration means, from the docstrings below the fields, and a JSON Schema for editors."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from llada_megatron.llada_moe.config.named import SECTIONS
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import fields_of
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.objectives import config_class, objective_kinds

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def descriptions(cls: type) -> dict[str, str]:
    """The docstring of each field of a dataclass that has one, by name, on one line."""
    return {name: text for base in reversed(cls.__mro__[:-1]) for name, text in _own_descriptions(base)}


@functools.cache
def _own_descriptions(cls: type) -> tuple[tuple[str, str], ...]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    return tuple(_described(body))


def _described(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for pair in itertools.pairwise(body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def json_schema(cls: type = RunConfig) -> dict[str, Any]:
    """A JSON Schema of a YAML file that holds a `cls`: its keys, types, choices, defaults and meanings.

    What depends on several keys is not in it; `llada inspect FILE` checks everything.
    """
    return {"$schema": DIALECT, "title": cls.__name__, **_mapping(cls)}


def _mapping(cls: type) -> dict[str, Any]:
    texts, defaults = descriptions(cls), {field.name: field for field in dataclasses.fields(cls)}
    properties: dict[str, Any] = {}
    for name, hint in fields_of(cls).items():
        value = _value(hint)
        if cls is RunConfig and name in SECTIONS:
            value = _named(value)
        default = _default(defaults[name])
        properties[name] = value | ({"description": texts[name]} if name in texts else {}) | default
    if cls is ObjectiveConfig:
        kinds = objective_kinds()
        for kind in kinds:  # a kind may have keys of its own
            own = config_class(kind)
            properties = (_mapping(own)["properties"] if own is not cls else {}) | properties
        properties["kind"] = properties["kind"] | {"enum": kinds}
    missing = dataclasses.MISSING
    required = [name for name, field in defaults.items() if field.default is field.default_factory is missing]
    described = {"description": " ".join(inspect.cleandoc(cls.__doc__ or "").split())}
    closed = {"type": "object", "properties": properties, "additionalProperties": False, **described}
    return closed | ({"required": required} if required else {})


def _value(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _mapping(typing.cast(type, hint))
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if part is type(None) else _value(part) for part in arguments]}
    if origin is list:
        return {"type": "array", "items": _value(arguments[0])}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    return {"type": _SCALARS[hint]}


def _named(mapping: dict[str, Any]) -> dict[str, Any]:
    """A section that may be a name, or a mapping over the `base` of a name, which then needs no other key."""
    over = mapping | {"properties": {"base": {"type": "string"}} | mapping["properties"]}
    complete = over.pop("required", [])
    alternatives = [{"required": complete}, {"required": ["base"]}] if complete else []
    return {"anyOf": [{"type": "string"}, over | ({"anyOf": alternatives} if alternatives else {})]}


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    missing = dataclasses.MISSING
    if field.default is not missing and not dataclasses.is_dataclass(field.default):
        return {"default": field.default}
    made = field.default_factory() if field.default_factory is not missing else missing
    return {"default": made} if isinstance(made, list) else {}
