"""Completion of command lines by the shell, with argcomplete (an extra): `eval "$(register-python-argcomplete llada)"`.

The shell runs the program to ask. Only the module of the command that is on the line is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

VARIABLE = "_ARGCOMPLETE"
"""Set by the shell's function when it asks."""


def is_asked() -> bool:
    """Whether the shell asks how the line may go on."""
    return VARIABLE in os.environ


def answer(parser: argparse.ArgumentParser, commands: Mapping[str, Any], parser_of: Callable[[str], Any]) -> None:
    """Write the possible next words for the shell, and end the process; does nothing without argcomplete.

    Args:
        parser: the parser of the program, without its commands.
        commands: the commands by name, each a tuple that ends with its help.
        parser_of: gives the parser of a command.
    """
    try:
        import argcomplete
    except ImportError:
        return
    named = next((word for word in os.environ.get("COMP_LINE", "").split()[1:] if word in commands), None)
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, (*_, text) in commands.items():
        parents = [parser_of(name)] if name == named else []
        for action in (action for parent in parents for action in parent._actions):
            if (choices := _CHOICES.get(action.dest)) is not None:
                action.completer = _with_files(choices)  # type: ignore[attr-defined]
        subparsers.add_parser(name, help=text, parents=parents, add_help=False)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _configurations() -> list[str]:
    from llada_megatron.llada_moe.config.named import MODELS, RUNS

    return [*RUNS.names(), *MODELS.names()]


def _clusters() -> list[str]:
    from llada_megatron.llada_moe.config.named import Named

    return Named("cluster", "clusters").names()


def _keys() -> list[str]:
    from llada_megatron.llada_moe.config.parsing import key_paths
    from llada_megatron.llada_moe.config.run import RunConfig

    return [f"{key}=" for key in key_paths(RunConfig)]


_CHOICES = {"config": _configurations, "model": _configurations, "cluster": _clusters, "overrides": _keys}
"""What an argument can be besides the name of a file, by its name in the parser."""


def _with_files(choices: Callable[[], list[str]]) -> Callable[..., list[str]]:
    from argcomplete.completers import FilesCompleter

    def complete(prefix: str, **_: Any) -> list[str]:
        return [*choices(), *FilesCompleter()(prefix)]

    return complete
