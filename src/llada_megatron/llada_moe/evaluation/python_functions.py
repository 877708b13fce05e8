"""Functions of Python code: texts that are whole in themselves, and short enough for a small model."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator


def parsed(text: str) -> ast.Module | None:
    """The syntax tree of a text, or None where it is no Python. It is parsed, and never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings, which are nobody's concern here
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def functions_of(text: str) -> Iterator[str]:
    """The functions and methods of a file in their order, without those inside of functions, each unindented.

    None where the text is no Python.
    """
    tree = parsed(text)
    if tree is not None:
        lines = text.splitlines(keepends=True)
        yield from _functions(tree.body, lines)


def _functions(body: list[ast.stmt], lines: list[str]) -> Iterator[str]:
    for each in body:
        if isinstance(each, ast.ClassDef):
            yield from _functions(each.body, lines)
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([each.lineno, *(decorator.lineno for decorator in each.decorator_list)])
            source = textwrap.dedent("".join(lines[first - 1 : each.end_lineno]))
            if parsed(source) is not None:  # a string over several lines may stand in the way of unindenting
                yield source
