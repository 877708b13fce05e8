"""Prompts from the command line: texts, files, standard input, and lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import ConfigError, DataError, LladaError
from llada_megatron.parallel.sampling.prompts import GAP_WORD, Extent, Gap, Prompt, require_text


@dataclass(frozen=True)
class PromptOptions:
    """What is done with each prompt: it is continued, unless `infill` or `edit` says otherwise."""

    infill: bool = False
    """Fill the gaps of the prompt."""
    gap_word: str = GAP_WORD
    edit: Extent | None = None
    """Replace this extent of the prompt."""
    new_tokens: int | None = None
    """Number of tokens that replace the extent; None = as many as it has."""

    def prompt(self, content: str | Sequence[int], number: int) -> Prompt:
        """The prompt of a text or of token ids. Raises ConfigError."""
        if self.edit is not None:
            return Prompt.edited(content, self.edit, self.new_tokens, number)
        if not self.infill:
            return Prompt.of(content, number)
        if isinstance(content, str):
            return Prompt.with_gaps(content, self.gap_word, number)
        raise ConfigError('token ids have no gap word: say where the gaps are with "gaps": [[START, END], …]')


@dataclass
class PromptSource:
    """Prompts, and messages about lines that hold none."""

    prompts: list[Prompt] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """A message for each broken line."""
    tolerant: bool = False
    """Whether a prompt that cannot be sampled is skipped, as broken lines are."""


def read_texts(texts: Sequence[str], files: Sequence[str], options: PromptOptions) -> PromptSource:
    """Prompts from texts and from files with one text each; from standard input if there are neither.

    Raises:
        ConfigError: there is no prompt, or the options do not fit one.
        DataError: a file is not UTF-8 text.
    """
    each = [*texts, *map(_text_of, files)]
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError(
                "nothing to sample from: give --prompt TEXT, --file FILE, --prompts FILE.jsonl, "
                "or a text on standard input"
            )
        each = [_text(_standard_input(), "standard input")]
    return PromptSource([options.prompt(text, number) for number, text in enumerate(each, start=1)])


def read_lines(name: str, options: PromptOptions) -> PromptSource:
    """Prompts from lines of JSON in a file, or on standard input ("-"). Raises DataError if there is no such file.

    A line is an object with `text`, or with `tokens` (ids) and optionally `gaps` ([start, end) pairs). `id` and
    `max_new_tokens` are optional, and other keys are ignored. The number of a prompt is that of its line, where blank
    lines count.
    """
    if name == "-":
        lines = _standard_input().decode("utf-8-sig", "surrogateescape").split("\n")
        return parse_lines(lines, "standard input", options)
    try:
        with open(name, encoding="utf-8-sig", errors="surrogateescape") as stream:
            return parse_lines(stream, name, options)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error


def parse_lines(lines: Iterable[str], name: str, options: PromptOptions) -> PromptSource:
    """Prompts from lines of JSON as in `read_lines`; `name` is that of the source, for messages."""
    source = PromptSource(tolerant=True)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            source.prompts.append(_line_prompt(line, number, options))
        except LladaError as error:
            source.broken.append(f"{name}, line {number}: {error}")
    return source


def _line_prompt(line: str, number: int, options: PromptOptions) -> Prompt:
    """The prompt of one line. Raises DataError or ConfigError."""
    values = _object(line)
    length = values.get("max_new_tokens")
    if length is not None and (not _is_number(length) or length < 1):
        raise DataError(f"max_new_tokens {length!r} is no number of tokens")
    require_text(json.dumps(values.get("id"), ensure_ascii=False), '"id"')
    if options.edit is not None and length is not None:
        options, length = replace(options, new_tokens=length), None
    content, gaps = _content(values), values.get("gaps")
    if gaps is None:
        prompt = options.prompt(content, number)
    elif isinstance(content, str):
        raise DataError('"gaps" belong to "tokens"; in a text --infill fills its gap words, such as <mask:2>')
    elif options.edit is not None:
        raise DataError('"gaps" and --edit: ids are edited at START:END, or their gaps are filled')
    else:
        prompt = _gapped(content, gaps, number)
    return replace(prompt, id=values.get("id"), max_new_tokens=length)


def _content(values: dict[str, Any]) -> str | list[int]:
    """The text or the token ids of a line. Raises DataError."""
    content = values.get("text", values.get("tokens"))
    if not isinstance(content, str if "text" in values else list) or {"text", "tokens"} <= values.keys():
        raise DataError('a prompt is {"text": "…"} or {"tokens": [ids]}')
    if isinstance(content, str):
        require_text(content, '"text"')
    elif not all(map(_is_number, content)):
        raise DataError('"tokens" are not all token ids')
    return content


def _object(line: str) -> dict[str, Any]:
    try:
        line.encode("utf-8")
        values = json.loads(line)
    except UnicodeEncodeError:
        raise DataError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError("not a JSON object")
    return values


def _gapped(tokens: list[int], gaps: Any, number: int) -> Prompt:
    """A prompt of token ids with gaps at [start, end) pairs. Raises DataError."""
    pieces: list[tuple[int, ...] | Gap] = []
    at = 0
    if not isinstance(gaps, list) or not gaps:
        raise DataError('"gaps" is a list of [START, END] pairs')
    for pair in gaps:
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))):
            raise DataError(f'"gaps" is a list of [START, END] pairs, not {pair!r}')
        start, end = pair
        if not at <= start < end <= len(tokens):
            raise DataError(f"gap {pair}: gaps are not empty, come in order, and end by {len(tokens)}, the last token")
        pieces += [tuple(tokens[at:start]), Gap(end - start)]
        at = end
    pieces.append(tuple(tokens[at:]))
    return Prompt(tuple(piece for piece in pieces if piece != ()), number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _standard_input() -> bytes:
    """All of standard input, with its line ends unchanged."""
    return sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()


def _text_of(name: str) -> str:
    """The text of a file, with its line ends unchanged, since they count in an extent."""
    try:
        return _text(Path(name).read_bytes(), name)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error})") from error
