"""`llada eval likelihood`: lines in, figures with errors and their protocol out, and what is said of wrong input."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.evaluation.scored_lines import split_pair
from llada_megatron.parallel.evaluation.likelihood_file import LikelihoodFile
from tests.launch.sampling.checkpoints import VOCABULARY, checkpoint, run_cli, tokenizer_in
from tests.tools.convert.checkpoints import config_of, tensors_of, to_sharded, write

LINES = [
    {"context": "two and two is ", "options": ["four", "five", "a fish"], "answer": 0, "id": "sum"},
    {"context": "a", "options": ["bc", "de"], "answer": 1},
    {"context": "once upon", "continuation": " a time"},
    {"text": "whole"},
]


def written(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_figures_come_with_errors_and_their_protocol(dense, tmp_path, capsys):
    file, output = written(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    words = ("eval", "likelihood", dense, file, "--samples", 16, "--output", output)
    code, out, err = run_cli(capsys, *words, "--json")
    assert code == 0, err
    *_, said, last = out.splitlines()
    assert said.startswith("protocol: bound: any-order bound")
    assert "16 samples in strata of 8, seed 0, masks shared" in said
    assert "no guidance; float32" in said
    found = json.loads(last)
    assert found["protocol"]["samples"] == 16
    assert (found["questions"], found["texts"]) == (2, 2)
    assert found["acc"]["value"] in (0.0, 0.5, 1.0)
    head, *records = map(json.loads, output.read_text().splitlines())
    assert head["protocol"] == found["protocol"]
    assert [each["number"] for each in records] == [1, 2, 3, 4]
    assert records[0]["id"] == "sum"
    assert records[0]["tokens"] == [len(" four"), len(" five"), len(" a fish")], "a space belongs to what follows"
    nats = -(records[2]["nats"][0] + records[3]["nats"][0])
    assert found["nats_per_token"]["value"] == pytest.approx(nats / 12)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / 12)
    assert found["nats_per_token"]["error"] > 0


def test_a_joint_model_is_scored_by_next_tokens_unless_asked_otherwise(tmp_path, capsys):
    config = dataclasses.replace(load_model("tiny-dense"), vocab_size=VOCABULARY)
    source = write(tmp_path / "source", tensors_of(config, "fp32"), config_of(config))
    (source / "generation_config.json").write_text('{"attention_pattern": "joint", "block_length": 8}')
    tokenizer_in(source)
    to_sharded(source, tmp_path / "joint")
    words = ("eval", "likelihood", tmp_path / "joint", written(tmp_path / "in.jsonl"), "--samples", 8)
    code, out, err = run_cli(capsys, *words)
    assert code == 0 and "protocol: next-token: exact log-likelihood" in out, err
    code, out, err = run_cli(capsys, *words, "--estimator", "bound", "--json")
    assert code == 0 and "protocol: bound: any-order bound" in out, err
    found = json.loads(out.splitlines()[-1])
    assert found["protocol"]["block"] == 8 and found["nats_per_token"]["value"] > 0


def test_an_interrupted_file_is_continued(dense, tmp_path, capsys):
    file, output = written(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    words = ("eval", "likelihood", dense, file, "--samples", 8, "--output", output)
    assert run_cli(capsys, *words)[0] == 0
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:9])  # killed within a line
    code, _, err = run_cli(capsys, *words)
    assert code == 0, err
    before, after = ([json.loads(line) for line in text.splitlines()] for text in (whole, output.read_text()))
    assert before[:3] == after[:3]
    assert [each["number"] for each in after[1:]] == [1, 2, 3, 4]
    for one, other in zip(before[3:], after[3:], strict=True):  # run beside other texts: the last bits may differ
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-4)
    code, _, err = run_cli(capsys, *words, "--seed", 1)
    assert code == 2
    assert f"{output}: its results were measured otherwise (seed)" in err
    assert run_cli(capsys, *words, "--seed", 1, "--overwrite")[0] == 0


def test_guidance_and_estimators_change_the_figure(dense, tmp_path, capsys):
    file = written(tmp_path / "in.jsonl", LINES[2:3])
    found = []
    for words in ((), ("--guidance", 2), ("--estimator", "confidence"), ("--estimator", "left-to-right")):
        code, out, err = run_cli(capsys, "eval", "likelihood", dense, file, "--samples", 8, "--json", *words)
        assert code == 0, err
        found.append(json.loads(out.splitlines()[-1])["nats_per_token"]["value"])
    assert len(set(found)) == 4


def test_a_model_for_conversations_is_told_apart(tmp_path, capsys):
    chatty = checkpoint(tmp_path, template="{{ messages[0]['content'] }}")
    code, _, err = run_cli(capsys, "eval", "likelihood", chatty, written(tmp_path / "in.jsonl"), "--samples", 8)
    assert code == 0
    assert "this checkpoint has a chat template" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not JSON"),
        ('{"context": "a"}', "line 2: no 'continuation'"),
        ('{"context": "a", "options": ["b"], "answer": 0}', 'line 2: "options" is a list of at least two'),
        ('{"context": "a", "options": ["b", "c"], "answer": 2}', "0 to 1, not 2"),
        ('{"context": "a", "continuation": ""}', "line 2: the answer '' adds no token"),
        ('{"context": [1], "continuation": [999]}', "line 2: the model has no token 999"),
        ('{"context": "a", "continuation": 3}', "is a text or a list of token ids"),
        pytest.param('{"text": ' + "[" * 99999 + "]" * 99999 + "}", "line 2: not JSON", id="deeply nested"),
    ],
)
def test_broken_lines_are_named(dense, tmp_path, capsys, line, told):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(LINES[2]) + "\n" + line + "\n")
    code, _, err = run_cli(capsys, "eval", "likelihood", dense, file, "--samples", 8)
    assert code == 1
    assert told in err
    assert len(err.splitlines()) == 1


def test_wrong_command_lines(dense, tmp_path, capsys):
    file = written(tmp_path / "in.jsonl")
    for words, told in [
        (("--samples", 12), "a multiple of the stratum"),
        (("--estimator", "next-token"), "next-token: a diffusion model"),
        (("--overwrite",), "belongs to --output"),
        (("--output", file), "this command reads"),
        (("schedule.steps=3",), "nothing is sampled here"),
        (("--limit", 0), "--limit 0: at least 1"),
    ]:
        code, _, err = run_cli(capsys, "eval", "likelihood", dense, file, *words)
        assert (code, told in err) == (2, True), err
    for words in ((tmp_path / "none.jsonl",), (file, "--output", tmp_path / "none" / "out.jsonl")):
        code, _, err = run_cli(capsys, "eval", "likelihood", dense, *words)
        assert (code, "No such file" in err) == (1, True)


def test_a_pair_is_cut_as_the_harness_cuts_it():
    class Joining:
        def encode(self, text):
            return [len(word) for word in text.replace(" ", "\0 ").split("\0") if word]

    assert split_pair("one two ", "three", Joining()) == ((3, 4), (6,))


def test_a_file_that_is_no_file_of_results_is_refused(tmp_path):
    from llada_megatron.llada_moe.errors import DataError

    kept = '{"protocol": {}}\n'
    deep, unnumbered = '{"a":' * 99999 + "1" + "}" * 99999, '{"nats": [-1], "tokens": [1], "bytes": [1]}'
    question = '{"number": 1, "right": 0, "acc": true, "acc_norm": true, "margin_error": 1}'
    for content in (
        "hello\n",
        '{"protocol": 3}\n',
        *(kept + line + "\n" for line in ("3", deep, unnumbered, question)),
    ):
        (tmp_path / "x").write_text(content)
        with pytest.raises(DataError, match="not a file of results"):
            LikelihoodFile(tmp_path / "x", {})
