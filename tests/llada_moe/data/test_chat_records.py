"""Conversations out of JSON: what is accepted, and what is said of the rest."""

import json

import pytest

from llada_megatron.llada_moe.data.chat_records import chat_records
from llada_megatron.llada_moe.data.formats import Reading
from llada_megatron.llada_moe.data.sources import find_sources
from llada_megatron.llada_moe.errors import DataError

READING = Reading("messages")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def read(path):
    return list(chat_records(find_sources([str(path)], READING), READING))


def test_lines_and_arrays_of_conversations(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    records = [
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "system", "content": ""}, parts, call, {"role": "tool", "content": "7"}, ANSWER],
         "tools": [{"name": "f"}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records))
    for name, places in (("a.jsonl", (":1", ":3")), ("b.json", (": record 1", ": record 2"))):
        first, second = read(tmp_path / name)
        assert (first.where, second.where) == tuple(f"{tmp_path / name}{place}" for place in places)
        assert (first.answers, first.tools, second.answers, second.tools) == ([1], None, [2, 4], [{"name": "f"}])
        assert second.messages[1]["content"] == "ab" and second.messages[2]["tool_calls"]
        assert first.text_bytes == 7


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2: the assistant's answer is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: the assistant's answer is empty"),
        ({"messages": [{"role": "bot", "content": "x"}, ANSWER]}, "message 1: unknown role 'bot'; known are system"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1 (user): no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "neither text nor a list of texts"),
        ({"messages": ["hi", ANSWER]}, "message 1 must be an object"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "half a surrogate pair at character 0"),
        ({"messages": []}, "'messages' has no messages"),
        ({"messages": "hi"}, "'messages' is str, not a list"),
        ({"text": "hi"}, "the record has the keys 'text' (--jsonl-key)"),
        ({"messages": [USER, ANSWER], "tools": "f"}, "'tools' is str, not a list"),
        ([1], "must be a JSON object"),
    ],
)
def test_what_is_no_conversation_is_said_with_its_place(tmp_path, record, said):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": [USER, ANSWER]}, record, {"messages": [USER, ANSWER]}])))
    first, broken, last = read(path)
    assert isinstance(broken, DataError) and str(broken).startswith(f"{path}:2: ") and said in str(broken)
    assert not isinstance(first, DataError) and not isinstance(last, DataError)


def test_a_broken_line_and_a_file_without_records(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + '\n{"messages": [\n')
    _, broken = read(path)
    assert str(broken).startswith(f"{path}:2: not JSON (")
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(DataError, match="plain text; conversations are read from JSON lines"):
        read(tmp_path / "plain.txt")
