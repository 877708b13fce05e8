"""`llada sample`: prompts in, lines out, and what is said of wrong input."""

import io
import json
from pathlib import Path

import pytest

from llada_megatron.launch.sampling.terminal_output import ResultPrinter
from llada_megatron.llada_moe.sampling.presets import PRESETS
from llada_megatron.parallel.sampling.results import Result
from tests.launch.sampling.checkpoints import run_cli


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_lines_in_and_out(dense, tmp_path, capsys):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"text": "ab"}\nbroken\n{"tokens": [10, 11], "id": "ids", "max_new_tokens": 3}\n')
    code, out, err = run_cli(
        capsys, "sample", dense, "--prompts", prompts, "--jsonl", "--max-new-tokens", 5, "--steps", 5
    )
    assert code == 1
    assert f"{prompts}, line 2: not JSON" in err
    first, second = lines_of(out)
    assert (first["number"], second["number"], second["id"]) == (1, 3, "ids")
    assert first["text"] == "ab" + first["new"]
    assert second["tokens"][:2] == [10, 11]
    assert second["new_tokens"] <= 3
    for line in (first, second):
        assert line["forwards"] >= 1
        assert line["seconds"] > 0
        assert line["new_tokens"] == sum(map(len, line["written"]))


def test_lines_from_standard_input(mute, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"tokens": [10, 11]}\n'))
    code, out, _ = run_cli(capsys, "sample", mute, "--prompts", "-", "--jsonl", "--max-new-tokens", 2)
    assert code == 0
    (line,) = lines_of(out)
    assert line["text"] is None
    assert line["tokens"][:2] == [10, 11]


def test_ids_are_printed_where_there_is_no_text(mute, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"tokens": [10, 11], "gaps": [[0, 1]]}')
    code, out, _ = run_cli(capsys, "sample", mute, "--prompts", tmp_path / "in.jsonl")
    assert code == 0
    assert out.split()[1:] == ["11"]


def test_an_edit_from_the_command_line(dense, capsys):
    code, out, _ = run_cli(capsys, "sample", dense, "--prompt", "the quick fox", "--edit", "4:9")
    assert code == 0
    assert out.startswith("the ")
    assert out.endswith(" fox\n")


def test_an_empty_prompt_is_fine(dense, capsys):
    code, out, _ = run_cli(capsys, "sample", dense, "--prompt", "", "--max-new-tokens", 4, "--jsonl")
    assert code == 0
    assert lines_of(out)[0]["new_tokens"] <= 4


@pytest.mark.parametrize(
    ("arguments", "forwards", "text"),
    [
        (["--steps", 3], 3, "3 steps do not divide 8 tokens: the first steps write one token more"),
        (["--steps", 3, "--block-length", 4], 3, "the 2 blocks take 2, 1"),
        (["--steps", 20], 8, "20 steps for 8 tokens: no block takes more steps than it has tokens, 8 in all"),
        (["--steps", 1, "--block-length", 4], 2, "1 steps for 2 blocks: each block takes at least one, 2 in all"),
    ],
)
def test_steps_that_do_not_divide_are_done_and_said(dense, capsys, arguments, forwards, text):
    code, out, err = run_cli(capsys, "sample", dense, "--infill", "--prompt", "a<mask:8>", *arguments, "--json")
    assert code == 0
    assert text in err
    assert json.loads(out)["forwards"] == forwards


def test_steps_that_divide_are_not_talked_about(dense, capsys):
    code, _, err = run_cli(capsys, "sample", dense, "--infill", "--prompt", "a<mask:8>", "--steps", 4)
    assert code == 0
    assert "steps" not in err


def test_presets_are_listed_without_a_checkpoint(capsys):
    code, out, _ = run_cli(capsys, "sample", "--list-presets")
    assert code == 0
    for name in ("llada", "fast-dllm-dual", "slowfast", "llada2"):
        assert f"{name}" in out


def test_the_guide_knows_every_preset():
    guide = (Path(__file__).parents[3] / "docs/sample.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in guide] == []


def test_a_preset_with_a_changed_setting(dense, capsys):
    few, many = (
        json.loads(
            run_cli(
                capsys, "sample", dense, "--preset", "fast-dllm-dual", f"schedule.threshold={threshold}", "--infill",
                "--prompt", "a<mask:30>", "--json",
            )[1]
        )["forwards"]
        for threshold in (0.001, 1)
    )  # fmt: skip
    assert few < many == 30


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preset", "quick"], "no preset 'quick'"),
        (["--schedule", "thresold"], "did you mean 'threshold'?"),
        (["schedule.threshold=0.5"], "the schedule 'steps' has no setting 'threshold'"),
        (["--preset", "fast-dllm", "schedule.threshold=high"], "schedule.threshold"),
        (["--cache", "block-causal"], "exact for block-causal models only"),
        (["--editor", "token-editing"], "not trained for editing"),
        (["--preset", "llada2"], "is for block-causal models"),
        (["threshold=1"], "threshold=1: sampling takes schedule.KEY=VALUE"),
        (["--schedule", "threshold", "--steps", "5"], "the schedule 'threshold' has no setting 'steps'"),
        (["--schedule", "threshold", "--remasking", "random"], "--remasking random is --schedule random"),
        (["--edit", "nowhere"], "'nowhere' is no extent"),
        (["--edit", "1:2", "--infill"], "--edit and --infill"),
        (["--gap-word", "x"], "--gap-word belongs to --infill"),
        (["--infill", "--max-new-tokens", "5"], "--max-new-tokens and --infill"),
        (["--prompts", "x.jsonl"], "--prompts beside --prompt"),
        (["--overwrite"], "--overwrite belongs to --output"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--infill"], "no <mask> to fill in 'a'"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--guidance", "inf"], "guidance inf: a finite number"),
        (["--cuda-graphs", "always"], "cuda_graphs always: this machine has no GPU"),
        (["--jsonl", "--output", "x.jsonl"], "--jsonl is for standard output"),
        (["--output", "."], "--output .: this is no file"),
        (["--output", "/dev/full"], "--output /dev/full: this is no file"),
        (["--max-new-tokens", "500"], "the model takes 128, that is 373 too many"),
    ],
)
def test_wrong_input_is_one_message(dense, capsys, arguments, text):
    code, out, err = run_cli(capsys, "sample", dense, "--prompt", "a", *arguments)
    assert code == 2
    assert text in err
    assert err.count("error:") == 1
    assert out == ""


def test_a_block_length_that_is_not_the_models(causal, capsys):
    code, _, err = run_cli(capsys, "sample", causal, "--prompt", "a", "--block-length", 16)
    assert code == 2
    assert "trained with block-causal attention over blocks of 32" in err


def test_the_users_word_allows_editing(dense, capsys):
    code, out, _ = run_cli(
        capsys, "sample", dense, "--prompt", "a", "--editor", "token-editing", "--trained-for-editing",
        "--max-new-tokens", 4, "--jsonl",
    )  # fmt: skip
    assert code == 0
    assert lines_of(out)[0]["new_tokens"] <= 4


def test_a_prompt_that_is_passed_over_holds_nothing_up(dense, capsys):
    printer = ResultPrinter(quiet=False, jsonl=True, numbers=[1, 2, 3])
    printer.expect([1, 3])
    for number in (3, 1):
        printer.take(Result(number, None, "t", "t", [1], [[1]], False, 1, 1, 0.1))
    assert [line["number"] for line in lines_of(capsys.readouterr().out)] == [1, 3]


def test_a_job_of_several_processes_writes_a_file(dense, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run_cli(capsys, "sample", dense, "--prompt", "a")
        assert (code, out) == (2, "")
        assert ("torchrun started 2 processes: give --output FILE" in err) == (rank == "0")


def test_texts_need_a_tokenizer(mute, capsys):
    code, _, err = run_cli(capsys, "sample", mute, "--prompt", "a")
    assert code == 1
    assert "give token ids in the place of texts" in err


def test_a_file_that_is_not_there(dense, capsys):
    code, _, err = run_cli(capsys, "sample", dense, "--prompts", "nowhere.jsonl")
    assert code == 1
    assert "nowhere.jsonl: No such file" in err
