# PYTHON_ARGCOMPLETE_OK
"""The `llada` program: finds the subcommand, parses its arguments, and turns errors into one message and an exit code.

A subcommand is a row of `COMMANDS` and a module with `add_arguments(parser)` and `run(args) -> int`; `EXAMPLES`, a text
below the help, is optional. The module is imported only when its command runs, and imports torch only inside `run`, so
that help appears at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType

from llada_megatron import __version__, completion, memory_ran_out
from llada_megatron.console import emit_json, error, message
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.report_address import how_to_report

COMMANDS = {
    "prepare": ("llada_megatron.tools.prepare", "turn text, folders or JSONL into tokens for training"),
    "init": ("llada_megatron.launch.init", "write a commented run file for a model and a machine"),
    "train": (
        "llada_megatron.launch.train",
        "train the run in a YAML file, with as many processes as its layout asks for",
    ),
    "submit": ("llada_megatron.launch.submit", "train a run on a SLURM cluster, as a job that survives faults"),
    "jobs": ("llada_megatron.launch.jobs", "show the submitted jobs: state, step, loss, speed, time left, restarts"),
    "logs": ("llada_megatron.launch.logs", "show what a submitted job, or one of its ranks, has printed"),
    "stop": ("llada_megatron.launch.stop", "let a submitted job save and end"),
    "sample": ("llada_megatron.launch.sample", "generate or infill text with a checkpoint"),
    "watch": ("llada_megatron.launch.watch", "show a text while it is unmasked, in the terminal or as a page"),
    "chat": ("llada_megatron.launch.chat", "talk with an instruction model"),
    "eval": ("llada_megatron.launch.evaluation", "measure what a model is worth: likelihood, multiple choice"),
    "convert": (
        "llada_megatron.tools.convert",
        "take checkpoints from and to the formats of Hugging Face, compare them, look into them",
    ),
    "merge": ("llada_megatron.tools.merge", "average checkpoints, the best of a run by validation loss"),
    "experts": ("llada_megatron.tools.experts", "show where tokens go in a checkpoint with experts"),
    "bench": ("llada_megatron.tools.bench", "measure this machine and check the project's claims"),
    "inspect": (
        "llada_megatron.tools.inspect",
        "show a resolved configuration, its parameters, and what each rank holds",
    ),
    "plan": ("llada_megatron.tools.plan", "what a run needs of each GPU, and how long it takes, before it is started"),
    "env": ("llada_megatron.tools.environment", "show versions, devices and accelerations (for bug reports)"),
}
COMMON_OPTIONS = ("--json", "--traceback")
"""Options that are allowed anywhere after the command, also after the name of a benchmark."""
VERSION_OPTION, VERSION = "--version", f"llada {__version__}"
USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
EXAMPLES = """\
examples:
  llada prepare my_texts/ --output data/mine --train-tokenizer --vocab-size 8192
  llada init small-moe --data data/mine --output run.yaml
  llada inspect demo                        check a run (of configs/runs, or a YAML file) before anything starts
  llada train demo training.steps=50        any key of the YAML file can be given here
  llada sample --help                       each command explains itself

Results go to stdout, messages and progress to stderr. Every command takes --json (the last line of stdout is one JSON
object) and --traceback. Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `llada ARGUMENTS`; returns the exit code."""
    if completion.is_asked():
        completion.answer(_main_parser(), COMMANDS, _parser_named)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text, and stderr does so as well
    command = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    options = _main_parser().parse_args(arguments[:command])
    if command == len(arguments):
        _main_parser().print_help(sys.stderr)
        return USAGE_ERROR
    name, rest = arguments[command], arguments[command + 1 :]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        error(
            f"unknown command {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; commands: {', '.join(COMMANDS)}")
        )
        return USAGE_ERROR
    if VERSION_OPTION in rest:
        print(VERSION)
        return 0
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except KeyboardInterrupt:
        message("interrupted")
        return INTERRUPTED
    args = _parse(command_parser(name, module), [argument for argument in rest if argument not in COMMON_OPTIONS])
    args.json |= "--json" in rest
    args.traceback |= options.traceback or "--traceback" in rest or os.environ.get("LLADA_TRACEBACK") == "1"
    return guarded(lambda: module.run(args), args)


def command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one subcommand, including the options that every command has."""
    parser = argparse.ArgumentParser(
        prog=f"llada {name}",
        description=COMMANDS[name][1],
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    parser.add_argument(VERSION_OPTION, action="version", version=VERSION)
    return parser


def _parser_named(name: str) -> argparse.ArgumentParser:
    return command_parser(name, importlib.import_module(COMMANDS[name][0]))


def _main_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="llada",
        usage="llada COMMAND [arguments]",
        description=f"Masked diffusion language models on Megatron-Core.\n\ncommands:\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(VERSION_OPTION, action="version", version=VERSION)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse with options allowed between positional arguments (argparse cannot where a parser has subcommands)."""
    if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions):
        return parser.parse_args(arguments)
    return parser.parse_intermixed_args(arguments)


def guarded(command: Callable[[], int], args: argparse.Namespace) -> int:
    """Run a command; an error that the user can act on becomes one message, a defect keeps its stack trace.

    Returns the exit code. `args` holds the values of the options `--json` and `--traceback`.
    """
    try:
        with _ended_by_signals():
            code = command()
        sys.stdout.flush()
        return code
    except _Ended as ended:
        message(f"ended by {ended.signal.name}")
        return 128 + ended.signal
    except KeyboardInterrupt:
        message("interrupted")
        return INTERRUPTED
    except BrokenPipeError as failure:
        return BROKEN_PIPE if _reader_left() else _report(failure, args, 1)
    except Exception as failure:
        short = memory_ran_out.recognised(failure)
        if short is not None:
            return _report(failure, args, short.exit_code, text=f"{short}; {memory_ran_out.what_to_lower(args)}")
        if isinstance(failure, LladaError | OSError):
            return _report(failure, args, getattr(failure, "exit_code", 1))
        args.traceback = True
        return _report(failure, args, 1, f"this is a defect in llada; {how_to_report()}: ")


class _Ended(SystemExit):
    """A signal asked this program to end; raised, so that temporary files are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise `_Ended`, where they would end the program at once; a second one does.

    A command that handles them itself does so from its own start on.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def _reader_left() -> bool:
    """Whether stdout is the broken pipe; if so, redirect it to nothing, so that the flush at exit raises no error."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # stdout is not a file
        return False
    poller = select.poll()
    poller.register(stdout, 0)  # errors are always reported, and a pipe without a reader counts as one
    if not poller.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _report(failure: Exception, args: argparse.Namespace, code: int, prefix: str = "", text: str = "") -> int:
    if args.traceback:
        traceback.print_exception(failure)
    text = text or str(failure) or type(failure).__name__
    error(prefix + text)
    if args.json:
        emit_json({"error": text, "exit_code": code})
    return code


if __name__ == "__main__":
    sys.exit(main())
