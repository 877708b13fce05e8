"""`llada chat`: a conversation with an instruction model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, error, message, visible
from llada_megatron.launch.sampling.options import add_method, add_model, settings_of
from llada_megatron.llada_moe.errors import ConfigError, LladaError

if TYPE_CHECKING:
    from rich.console import Console

    from llada_megatron.parallel.sampling.conversation import Conversation
    from llada_megatron.parallel.sampling.settings import Settings

ANSWER_TOKENS, BLOCK_LENGTH = 128, 32
"""Positions of an answer and of its blocks, as in LLaDA's chat.py."""
EXAMPLES = """\
examples:
  llada chat runs/llada-8b-instruct
  llada chat runs/llada-8b-instruct --system 'Answer in one sentence.' --preset fast-dllm-dual
  echo 'What is the capital of France?' | llada chat runs/llada-8b-instruct

/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer. The chat template is the one that
came with the checkpoint's tokenizer; --template llada uses the role markers of LLaDA-8B-Instruct."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada chat`."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--template", metavar="NAME", help="llada, plain, or a file with a Jinja template")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"the longest answer (default: {ANSWER_TOKENS})"
    )
    add_method(parser, batched=False)


def run(args: argparse.Namespace) -> int:
    """Answer messages until the input ends; raises ConfigError, DataError or CheckpointError."""
    from llada_megatron.parallel.sampling.chat_template import find_template
    from llada_megatron.parallel.sampling.conversation import Conversation
    from llada_megatron.parallel.sampling.sampler import open_sampler

    settings = _in_blocks(settings_of(args, ANSWER_TOKENS))
    if settings.layout.world_size > 1:
        raise ConfigError("llada chat runs in one process; leave layout.… out")
    with open_sampler(settings) as sampler:
        conversation = Conversation(
            sampler, find_template(sampler.session.require_tokenizer(), args.template), args.system
        )
        failed = _converse(conversation, args.json)
    if args.json:
        emit_json({"messages": conversation.messages, "forwards": sum(r.forwards for r in conversation.results)})
    return 1 if failed else 0


def _in_blocks(settings: Settings) -> Settings:
    """The settings with LLaDA's block length, unless the user, a preset or the model determines another one."""
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of

    if settings.block_length is not None or settings.preset is not None:
        return settings
    grid = run_of(find_checkpoints(settings.checkpoint)[0]).objective.block_size
    return settings if grid is not None else replace(settings, block_length=BLOCK_LENGTH)


def _converse(conversation: Conversation, quiet: bool) -> bool:
    """Answer every message; returns whether one of them could not be answered."""
    from rich.console import Console

    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and not quiet
    failed = False
    for text in _messages():
        if text == "/reset":
            conversation.reset()
            message("the conversation is forgotten")
        elif text.startswith("/") and text[1:].isalpha():
            message(f"{text}: there are /reset and /exit")
        else:
            try:
                _answer(conversation, text, console if live else None, quiet)
            except LladaError as failure:
                hint = "; /reset forgets the conversation so far" if conversation.results else ""
                error(f"{failure}{hint}")
                failed = True
    return failed


def _answer(conversation: Conversation, text: str, console: Console | None, quiet: bool) -> None:
    """Answer one message, and show the steps on `console` if there is one."""
    from llada_megatron.launch.sampling.display import Screen

    before = len(conversation.messages)
    with contextlib.ExitStack() as held:
        screen = None
        try:
            for answering in conversation.ask(text):
                if console is not None:
                    screen = screen or held.enter_context(Screen(console, answering.first))
                    masked = answering.view.masked
                    screen.show(answering.view, answering.step.number, f"step {answering.step.number}, {masked} to go")
        except KeyboardInterrupt:
            held.close()
            message("the answer was stopped, and the question is forgotten")
    if len(conversation.messages) > before and not quiet:
        answer = conversation.messages[-1]["content"]
        print(answer if console is None else visible(answer), flush=True)


def _messages() -> Iterator[str]:
    """The messages of the user: typed lines, or the lines of standard input where that is no terminal."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a message in another encoding is refused by itself
        for line in sys.stdin:
            if line.strip() == "/exit":
                return
            if line.strip():
                yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/exit":
            return
        if text:
            yield text
