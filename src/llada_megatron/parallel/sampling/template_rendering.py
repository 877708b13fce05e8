"""A chat template rendered as transformers renders it. This runs in the process with limits."""

from __future__ import annotations

import datetime
import functools
import json
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_megatron.llada_moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jinja2.parser import Parser

_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, around what the assistant says: it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The text inside the tag, as a block whose variables do not leave it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def render(template: str, variables: Sequence[dict[str, Any]]) -> list[str]:
    """The text of a template for each set of variables, all at the same moment.

    Raises:
        DataError: the template cannot be run.
        ConfigError: the template refuses the conversation.
    """
    now = datetime.datetime.now()
    try:
        return [_compiled(template).render(strftime_now=now.strftime, **values) for values in variables]
    except TemplateError as error:
        raise DataError(f"the chat template cannot be run ({type(error).__name__}: {error})") from error
    except _FAILURES as error:
        raise DataError(f"the chat template fails ({type(error).__name__}: {error})") from error


@functools.lru_cache(4)
def _compiled(template: str) -> Template:
    extensions: list[str | type[Extension]] = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "dict": _Dict()}
    return environment.from_string(template)


class _Dict:
    """`dict` of a template, without the attributes of the type."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Each of the keys with the same value."""
        return dict.fromkeys(keys, value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(text: Any = "") -> NoReturn:
    """The function that a template calls in order to refuse a conversation."""
    raise ConfigError(f"the chat template refuses this conversation: {text}")
