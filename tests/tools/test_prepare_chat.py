"""`llada prepare --chat`: a set with answers, whole, verified, and refused where conversations are not."""

import json
import shutil

import pytest

from llada_megatron.llada_moe.data import sources
from llada_megatron.llada_moe.data.answers import AnswerFile
from llada_megatron.llada_moe.data.generated_chats import generated_chats
from llada_megatron.llada_moe.data.indexed import TokenFile
from llada_megatron.llada_moe.data.set_manifest import read_manifest, tokenizer_of
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.parallel.sampling.chat_template import LLADA, PLAIN
from tests.launch.sampling.checkpoints import run_cli, tokenizer_in

USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}
CHATS = [
    {"messages": [USER, ANSWER]},
    {"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER, {"role": "assistant", "content": "ü"}]},
]


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer_in(tmp_path, LLADA)

    def run(records, *options, tokenizer="tokenizer.json"):
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        given = ["--tokenizer", tokenizer] if tokenizer else []
        return run_cli(capsys, "prepare", "chats.jsonl", "--chat", "--output", "set", *given, *options)

    return run


def test_answers_stand_in_the_set_and_in_its_manifest(prepare, capsys):
    code, _, err = prepare(CHATS)
    assert code == 0, err
    manifest = read_manifest("set")
    tokenizer, tokens, answers = tokenizer_of("set", manifest), TokenFile("set"), AnswerFile("set", manifest)
    said = []
    for document in range(tokens.documents):
        begin, size = tokens.span(document)
        ids = tokens.tokens[begin : begin + size].tolist()
        assert ids[-1] == tokenizer.eos_id
        said.append([tokenizer.decode(ids[a:b]) for a, b in answers.within(begin, begin + size)])
    assert [[text.removesuffix("<|eot_id|>") for text in texts] for texts in said] == [["two"], ["two", "ü"]]
    facts = manifest.chat
    assert (facts.answers, facts.answer_tokens, facts.template) == (3, 4 + 4 + 3, LLADA)
    assert facts.longest == max(tokens.span(n)[1] for n in range(2))
    assert manifest.bytes == sum(len(m["content"].encode()) for chat in CHATS for m in chat["messages"])
    assert run_cli(capsys, "prepare", "--verify", "set")[0] == 0
    with open("set.answers", "r+b") as file:
        file.write(b"\x01")
    code, _, err = run_cli(capsys, "prepare", "--verify", "set")
    assert code == 1 and "set.answers: damaged or replaced" in err


def test_a_broken_conversation_ends_it_or_is_left_out(prepare):
    records = [CHATS[0], {"messages": [USER]}, CHATS[1], {"messages": [USER, {"role": "assistant", "content": ""}]}]
    code, _, err = prepare(records)
    assert code == 1 and "chats.jsonl:2: no message of the assistant" in err
    code, _, err = prepare(records, "--skip-broken", "1")
    assert code == 1 and "chats.jsonl:4: message 2: the assistant's answer is empty (more than the 1 broken" in err
    code, _, err = prepare(records, "--skip-broken", "2")
    assert code == 0 and "left out 2 conversations (--skip-broken): chats.jsonl:2" in err
    assert read_manifest("set").documents == 2
    assert prepare([{"messages": [USER]}], "--skip-broken", "1", "--overwrite")[0] == 1


def test_prepare_says_that_answers_of_a_rewritten_conversation_are_held_out_apart(prepare, tmp_path):
    (tmp_path / "forgetful.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m.content if loop.last or m.role == 'user' }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>{% endif %}"
    )
    code, _, err = prepare(CHATS, "--template", "forgetful.jinja")
    assert code == 0 and "1 conversations became one document for each answer" in err
    assert "answers of one conversation may stand in both parts" in err


def test_text_in_the_place_of_conversations_takes_the_answers_away(prepare, capsys, tmp_path):
    assert prepare(CHATS)[0] == 0
    (tmp_path / "a.txt").write_text("words " * 50)
    command = ("prepare", "a.txt", "--output", "set", "--tokenizer", "tokenizer.json", "--overwrite")
    assert run_cli(capsys, *command)[0] == 0
    assert not (tmp_path / "set.answers").exists()
    with pytest.raises(DataError, match="holds plain text, in which nothing is an answer"):
        AnswerFile("set", read_manifest("set"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--deduplicate"], "--deduplicate compares texts"),
        (["--format", "text"], "--format text goes without --chat"),
        (["--template", "plain"], "has no token </s>"),
        (["--template", "missing.jinja"], "give llada, plain, or a file"),
    ],
)
def test_options_that_do_not_go_together(prepare, options, said):
    code, _, err = prepare(CHATS, *options)
    assert code != 0 and said in err and err.count("\n") == 1


def test_a_tokenizer_without_a_template_and_a_trained_one(prepare, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "generated_chats", lambda: generated_chats(300))
    (tmp_path / "bare").mkdir()
    shutil.copy("tokenizer.json", "bare/tokenizer.json")
    code, _, err = prepare(CHATS, tokenizer="bare/tokenizer.json")
    assert code == 1 and "no chat template" in err and "--template FILE" in err
    train = ("--train-tokenizer", "--vocab-size", "300")
    code, _, err = prepare(CHATS, *train, tokenizer=None)
    assert code == 2 and "needs --template plain or FILE" in err
    code, _, err = run_cli(
        capsys, "prepare", "generated-chats", "--chat", "--output", "set", *train[:1], "--vocab-size", "320",
        "--template", "plain",
    )  # fmt: skip
    assert code == 0, err
    manifest = read_manifest("set")
    assert manifest.documents == 300 and manifest.chat.template == PLAIN
    assert manifest.vocabulary_held_out == 0.01
