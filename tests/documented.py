"""The command lines in the guides and below the help texts, found and made complete: what a reader would type."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llada_megatron import cli
from llada_megatron.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAM = re.compile(r"(llada|make|pip)( |$)|python -m benchmarks\.\w")
_ANY = re.compile(r"bench(marks\.| )NAME")
_STARTERS = re.compile(r"^(?:srun|torchrun)(?: --no-python| --[a-z-]+ \d+)* (?=llada )")


@dataclass(frozen=True)
class Documented:
    """A command as one could type it, and where it stands. `named_only`: a command is spoken of, without arguments."""

    where: str
    words: tuple[str, ...]
    named_only: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def commands() -> list[Documented]:
    """Every command of the guides and of `--help`, once each."""
    found = [*itertools.chain.from_iterable(map(_of_guide, GUIDES)), *_of_help()]
    found.sort(key=lambda each: not each.named_only)  # what stands in a block is more than a name, and comes last
    return list({each.words: each for each in found}.values())


def _of_guide(guide: Path) -> Iterator[Documented]:
    text = guide.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("", "bash", "sh"):
            yield from _of_lines(guide.name, block)
    for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        line = " ".join(span.replace("\\|", "|").split())
        for each in _of_line(guide.name, line):
            name = 3 if each.words[0] == "python" or each.words[1:2] in (("bench",), ("convert",), ("eval",)) else 2
            bare = len(each.words) <= (1 if each.words[0] == "make" else name)
            yield Documented(each.where, each.words, bare)


def _of_help() -> Iterator[Documented]:
    yield from _of_lines("llada --help", cli.EXAMPLES)
    for name, (module, _) in COMMANDS.items():
        yield from _of_lines(f"llada {name} --help", getattr(importlib.import_module(module), "EXAMPLES", ""))


def _of_lines(where: str, text: str) -> Iterator[Documented]:
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        yield from _of_line(where, re.split(r"\s{2,}|\s#", line.strip())[0])  # an explanation stands apart


def _of_line(where: str, line: str) -> Iterator[Documented]:
    """The commands of one line: those between `|`, `&&` and `·`, each way of a synopsis, without what starts it."""
    for part in re.split(r" \| (?![^(\[]*[)\]])| && | · ", line.removeprefix("$ ")):
        part = _STARTERS.sub("", part.strip())
        if _PROGRAM.match(part) and not _ANY.search(part):
            for way in _ways(part):
                yield Documented(where, tuple(shlex.split(way)))


def _ways(text: str) -> Iterator[str]:
    """A synopsis without and with its optional parts, and with each of its alternatives."""
    match = re.search(r"\[([^\[\]]*)\]|\(([^()]*\|[^()]*)\)|(?<=\s)(\w+(?:\|\w+)+)", text)
    if text.startswith("pip") or match is None or text.count("'") > text[: match.start()].count("'") > 0:
        yield re.sub(r" ?…", "", text)
        return
    optional, grouped, words = match.groups()
    choices = ["", *optional.split(" | ")] if optional is not None else (grouped or words).split("|")
    for choice in choices:
        yield from _ways(f"{text[: match.start()]}{choice.strip()}{text[match.end() :]}".strip())
