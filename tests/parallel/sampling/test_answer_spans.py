"""Which tokens of a conversation are answers, by chat template."""

import pytest

from llada_megatron.llada_moe.data.chat_records import ChatRecord
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.parallel.sampling.answer_spans import chat_tokens
from llada_megatron.parallel.sampling.chat_template import LLADA, PLAIN, ChatTemplate, Rendering
from tests.launch.sampling.checkpoints import SPECIAL, tokenizer_in

LINES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}:{{ m.content or '' }}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% endif %}<|eot_id|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant:{% endif %}"
)
"""With a line's end behind each turn, which a model need not learn."""
FORGETFUL = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}:"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant:{% endif %}"
)
"""Earlier answers are written without what stands before a bar."""
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
EOT = SPECIAL.index("<|eot_id|>")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "add|2"},
    {"role": "user", "content": "ü <|eot_id|>?"},
    {"role": "assistant", "content": "no|<|eot_id|> is text"},
    {"role": "user", "content": "never seen"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_in(folder)
    return load_tokenizer(folder)


def record(messages=MESSAGES, tools=None):
    return ChatRecord("x.jsonl:7", messages, tools)


@pytest.mark.parametrize("text", [LLADA, LINES])
def test_prompt_is_what_chat_samples_behind_and_answer_ends_with_the_turn(tokenizer, text):
    template = ChatTemplate(text, tokenizer, {})
    (chat,) = chat_tokens(template, record())
    assert len(chat.answers) == 2
    for number, said, (first, stop) in zip((2, 4), ("add|2", "no|<|eot_id|> is text"), chat.answers, strict=True):
        assert chat.ids[:first] == template.encode(MESSAGES[:number])
        assert chat.ids[first:stop] == [*tokenizer.encode(said), EOT]
    assert chat.answers[-1][1] == len(chat.ids)  # what the user says last has no answer


def test_a_template_that_rewrites_history_gives_a_document_for_each_answer(tokenizer):
    template = ChatTemplate(FORGETFUL, tokenizer, {})
    first, second = chat_tokens(template, record([*MESSAGES[:3], MESSAGES[1], {"role": "assistant", "content": "3"}]))
    ((begin, stop),) = first.answers
    assert tokenizer.decode(first.ids[begin:stop]).startswith("add|2") and stop == len(first.ids)
    ((begin, stop),) = second.answers
    assert second.ids[begin:stop] == [*tokenizer.encode("3"), EOT]
    assert "add" not in tokenizer.decode(second.ids)


def test_calls_of_tools_are_answers(tokenizer):
    template = ChatTemplate(LINES, tokenizer, {})
    messages = [MESSAGES[1], CALL, {"role": "tool", "content": "2"}, MESSAGES[2]]
    (chat,) = chat_tokens(template, record(messages, [{"a": 1}]))
    assert tokenizer.decode(chat.ids).startswith('[{"a": 1}]')
    assert [tokenizer.decode(chat.ids[a:b]) for a, b in chat.answers][1].startswith("add|2")
    assert tokenizer.decode(chat.ids[slice(*chat.answers[0])]).startswith('[{"name": "f"}]')


@pytest.mark.parametrize("text", [LLADA, PLAIN])
def test_a_message_without_content_has_no_text_in_the_built_in_templates(tokenizer, text):
    template = ChatTemplate(text, tokenizer, {})
    none, empty = ([MESSAGES[1], {**CALL, "content": content}] for content in (None, ""))
    assert template.render([Rendering(none, False)]) == template.render([Rendering(empty, False)])


def test_a_template_that_refuses_a_conversation_without_its_calls_reads_them(tokenizer):
    refused = "{% if not add_generation_prompt and not (tools and messages[1].tool_calls) %}"
    reads = LINES + refused + "{{ raise_exception('no call') }}{% endif %}"
    assert chat_tokens(ChatTemplate(reads, tokenizer, {}), record([MESSAGES[1], CALL], [{"a": 1}]))


@pytest.mark.parametrize(
    ("text", "messages", "tools", "said"),
    [
        (LINES, MESSAGES[:3], [{"name": "<|eot_id|>"}], "<|eot_id|> in a call or description of tools"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'A' if add_generation_prompt }}", MESSAGES[:3], None,
         "message 3: the chat template does not begin an answer with its generation prompt"),
        (LLADA, [MESSAGES[1], CALL], None, "the chat template does not write tool calls; give --template FILE"),
        (LLADA, MESSAGES[:3], [{"name": "f"}], "the chat template does not write the descriptions of tools"),
        ("{{ raise_exception('no') }}", MESSAGES[:3], None, "the chat template refuses this conversation: no"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_its_place(tokenizer, text, messages, tools, said):
    with pytest.raises(DataError) as caught:
        chat_tokens(ChatTemplate(text, tokenizer, {}), record(messages, tools))
    assert str(caught.value).startswith("x.jsonl:7: ") and said in str(caught.value)
