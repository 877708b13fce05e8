"""Conversations as token ids, by the chat template that came with the tokenizer of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.data.guarded_tokenizer import GuardedTokenizer
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.guard import process

LLADA = (
    "{{ '<|startoftext|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + (message['content'] or '') | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The role markers of LLaDA-8B-Instruct, for checkpoints that have its tokens but not its template."""

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + (message['content'] or '') | trim }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""For vocabularies that `llada prepare` trains, whose only special tokens are the end of text and the mask."""

BUILT_IN = {
    "llada": (LLADA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "plain": (PLAIN, ("</s>",)),
}
"""Templates by name, and the special tokens that each needs."""

_RENDER = "llada_megatron.parallel.sampling.template_rendering:render"
_RENDER_CPU_S = 4
"""Processor time for rendering a conversation; honest templates take milliseconds."""

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters around the numbers that stand for messages while a template is rendered."""

Message = Mapping[str, Any]
"""`role` (system, user, assistant or tool) and `content`; of a message that calls tools also `tool_calls`."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template in the format of Hugging Face, and the tokenizer whose tokens it names.

    The template is rendered in a sandbox of Jinja, in the process with limits.
    """

    template: str
    tokenizer: Tokenizer
    names: Mapping[str, str]
    """Special tokens that the template may use by name, such as `bos_token`."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Only the template's own text gives special tokens; their names in a message are ordinary text.

        Raises:
            DataError: the template cannot be run.
            ConfigError: the template refuses the conversation, or it changes the messages and one of them holds the
                name of a special token, which then cannot be told from one of the template's own.
        """
        whole, parts = self.parts(messages)
        return self.ids_of(whole, parts)

    def ids_of(self, whole: str, parts: Sequence[str | SpecialToken]) -> list[int]:
        """Ids of a text, given also as the texts and special tokens that it is made of."""
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
            else:
                ids += [*self._encoded(text), part.id]
                text = ""
        ids += self._encoded(text)
        if not isinstance(self.tokenizer, GuardedTokenizer):
            return ids
        # As transformers does it, where no message names a token: a split can depend on the tokens before it.
        as_a_whole = self.tokenizer.encode_with_names(whole)
        return as_a_whole if self._special(as_a_whole) == self._special(ids) else ids

    @property
    def end_of_turn(self) -> int | None:
        """The token that the template puts after an answer; None if it puts none."""
        question, answer = {"role": "user", "content": "-"}, {"role": "assistant", "content": _OPEN}
        (text,) = self.render([Rendering([question, answer], answer_follows=False)])
        found = next(self._named(text.partition(_OPEN)[2]), None)
        return None if found is None else self.tokenizer.special_ids[found[0]]

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []

    def _special(self, ids: Sequence[int]) -> list[int]:
        special = set(self.tokenizer.special_ids.values())
        return [i for i in ids if i in special]

    def parts(
        self, messages: Sequence[Message], answer_follows: bool = True, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[str | SpecialToken]]:
        """The rendered conversation: as one text, and as texts and the special tokens that the template put between.

        The template is rendered once with numbers in the place of the messages, to know which text is its own, and once
        with the messages, to check that it only strips or keeps them.

        Raises:
            DataError, ConfigError: as `encode`.
        """
        contents = [message["content"] or "" for message in messages]
        marked = [
            {**message, "content": f"{_OPEN}{i}{_CLOSE}" if contents[i] else message["content"]}
            for i, message in enumerate(messages)
        ]
        with_marks, whole = self.render([Rendering(each, answer_follows, tools) for each in (marked, messages)])
        numbers = "|".join(map(str, range(len(messages))))
        pieces = re.split(f"{_OPEN}({numbers}){_CLOSE}", with_marks)
        for change in (str, str.strip):
            changed = [change(content) for content in contents]
            filled = [changed[int(piece)] if i % 2 else piece for i, piece in enumerate(pieces)]
            if "".join(filled) == whole:
                parts = [([piece] if i % 2 else self._split(piece)) for i, piece in enumerate(filled)]
                return whole, [part for piece in parts for part in piece]
        if (name := self.named("\n".join(contents))) is not None:
            raise ConfigError(f"a message holds {name}, which this chat template would make a special token of")
        return whole, self._split(whole)

    def _split(self, text: str) -> list[str | SpecialToken]:
        """A text of the template, split at its special tokens."""
        parts: list[str | SpecialToken] = []
        at = 0
        for name, start in self._named(text):
            parts += [text[at:start], SpecialToken(self.tokenizer.special_ids[name], name)]
            at = start + len(name)
        return [*parts, text[at:]]

    def named(self, text: str) -> str | None:
        """The first name of a special token in a text."""
        return next((name for name, _ in self._named(text)), None)

    def _named(self, text: str) -> Any:
        """Names of the special tokens in a text and where each begins; of several at one position the longest."""
        names = sorted(self.tokenizer.special_ids, key=len, reverse=True)
        if not names:
            return iter(())
        return ((match[0], match.start()) for match in re.finditer("|".join(map(re.escape, names)), text))

    def render(self, renderings: Sequence[Rendering]) -> list[str]:
        """The texts of conversations. Raises DataError or ConfigError, as `encode`."""
        variables = [
            {
                "documents": None,
                **self.names,
                "messages": [dict(message) for message in each.messages],
                "tools": None if each.tools is None else list(each.tools),
                "add_generation_prompt": each.answer_follows,
            }
            for each in renderings
        ]
        return process.call("the chat template", _RENDER, self.template, variables, cpu_s=_RENDER_CPU_S)


@dataclass(frozen=True)
class Rendering:
    """What a chat template is rendered with."""

    messages: Sequence[Message]
    answer_follows: bool
    """Whether the text ends where the assistant's next answer begins."""
    tools: Sequence[Any] | None = None
    """Descriptions of the tools that the assistant may call."""


@dataclass(frozen=True)
class SpecialToken:
    """A special token that the template put in."""

    id: int
    name: str


def find_template(tokenizer: Tokenizer, wanted: str | None) -> ChatTemplate:
    """The chat template to be used with a tokenizer.

    Args:
        tokenizer: that of the checkpoint.
        wanted: None for the template beside the tokenizer, a name in `BUILT_IN`, or that of a file with a template.

    Raises:
        DataError: there is no such template, or it cannot be read.
    """
    names = _special_names(tokenizer.path.parent)
    if wanted in BUILT_IN:
        text, needed = BUILT_IN[wanted]
        missing = [name for name in needed if name not in tokenizer.special_ids]
        if missing:
            raise DataError(f"--template {wanted}: the tokenizer {tokenizer.path} has no token {', '.join(missing)}")
        return ChatTemplate(text, tokenizer, names)
    if wanted is not None:
        try:
            return ChatTemplate(Path(wanted).read_text("utf-8"), tokenizer, names)
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(BUILT_IN)
            raise DataError(f"--template {wanted}: {error}; give {known}, or a file with a Jinja template") from error
    text = _template_beside(tokenizer.path.parent)
    if text is None:
        raise DataError(
            f"the checkpoint has no chat template (looked in {tokenizer.path.parent}): it was not trained to hold a "
            "conversation, or its template was lost; use llada sample, or give --template llada or --template FILE"
        )
    return ChatTemplate(text, tokenizer, names)


PLAIN_TEXT_NOTE = (
    "this checkpoint has a chat template: it was trained to answer inside it, and the likelihood of plain text says "
    "little of it"
)


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a template came with a checkpoint's tokenizer. Raises DataError if it cannot be read."""
    return _template_beside(tokenizer.path.parent) is not None


def _template_beside(folder: Path) -> str | None:
    """The template in a folder with Hugging Face's files: a file of its own, or a key of `tokenizer_config.json`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: {error}; give --template FILE with a Jinja template") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json_object(folder / name).get("chat_template")
        if isinstance(found, list):  # a list of named templates
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default", next(iter(named.values()), None))
        if isinstance(found, str):
            return found
    return None


def _special_names(folder: Path) -> dict[str, str]:
    """The special tokens that the files of a tokenizer name, such as `bos_token`."""
    config = _json_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # as transformers does, which calls this file a legacy
        config |= _json_object(folder / "special_tokens_map.json")
    names = {}
    for key, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            names[key] = value
    return names


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}
