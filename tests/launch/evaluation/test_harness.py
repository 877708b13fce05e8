"""`llada eval harness` on tasks that are defined here, without a network."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.errors import ConfigError
from tests.launch.sampling.checkpoints import checkpoint, run_cli, start_cli

pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra eval)")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Twenty questions, asked in three ways."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} and one is", "options": [f" {n + 1}", f" {n}", " no"], "answer": 0} for n in range(20)]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("own_choice", CHOICE), ("own_written", WRITTEN), ("own_rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def evaluated(capsys, *words):
    code, out, err = run_cli(capsys, "eval", "harness", *words, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), out


def test_local_tasks_of_all_three_kinds(dense, tasks, tmp_path, capsys):
    names = "own_choice,own_written,own_rolling"
    words = (dense, "--tasks", names, "--task-folder", tasks, "--samples", 8, "--limit", 6)
    found, out = evaluated(capsys, *words, "--output", tmp_path / "out.json")
    assert set(found["results"]) == set(names.split(","))
    assert {"acc,none", "acc_norm,none"} <= found["results"]["own_choice"].keys()
    assert found["results"]["own_rolling"]["bits_per_byte,none"] > 0
    assert found["protocol"]["likelihood"]["samples"] == 8
    assert "likelihood: bound: any-order bound" in out
    whole = json.loads((tmp_path / "out.json").read_text())
    assert len(whole["samples"]["own_choice"]) == 6
    assert all("\n" not in each["resps"][0][0] for each in whole["samples"]["own_written"])


def test_guidance_is_used(dense, tasks, tmp_path, capsys):
    found = []
    for weight in (0, 2):
        words = (dense, "--tasks", "own_choice", "--task-folder", tasks, "--samples", 8, "--guidance", weight)
        evaluated(capsys, *words, "--limit", 2, "--output", tmp_path / "out.json")
        samples = json.loads((tmp_path / "out.json").read_text())["samples"]["own_choice"]
        found.append([float(each[0][0]) for sample in samples for each in sample["resps"]])
    assert all(abs(a - b) > 1e-4 for a, b in zip(*found, strict=True))


def test_an_interrupted_run_goes_on(dense, tasks, tmp_path, capsys, monkeypatch):
    from llada_megatron.launch.evaluation import harness_model
    from llada_megatron.parallel.evaluation.served_model import ServedModel

    monkeypatch.setattr(harness_model, "TOGETHER", 4)
    words = (dense, "--tasks", "own_choice", "--task-folder", tasks, "--samples", 8, "--limit", 6)
    undisturbed, _ = evaluated(capsys, *words)
    asked, interrupt = [], [True]
    whole = ServedModel.log_likelihoods

    def counted(self, pairs):
        asked.append(len(pairs))
        if interrupt and len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, pairs)

    monkeypatch.setattr(ServedModel, "log_likelihoods", counted)
    code, _, _ = run_cli(capsys, "eval", "harness", *words, "--resume", tmp_path / "kept")
    assert code == 130
    asked.clear()
    interrupt.clear()
    again, _ = evaluated(capsys, *words, "--resume", tmp_path / "kept")
    assert again["results"] == undisturbed["results"]
    assert sum(asked) == 18 - 4, "the first four answers were kept"


@pytest.fixture(scope="module")
def by_one_process(dense, tasks):
    """The results of all three tasks."""
    return json.loads(in_a_process(dense, tasks)[-1])["results"]


def in_a_process(dense, tasks, *words):
    """The lines of the standard output of `llada eval harness` on all three tasks."""
    process = start_cli(*command(dense, tasks), *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()


def command(dense, tasks):
    names = "own_choice,own_written,own_rolling"
    return ("eval", "harness", dense, "--tasks", names, "--task-folder", tasks, "--samples", 8, "--limit", 20, "--json")


@pytest.mark.parametrize("axis", ["tensor_parallel", "data_parallel", "pipeline_parallel"])
def test_two_ranks_find_what_one_process_does(dense, tasks, by_one_process, axis):
    assert close(json.loads(in_a_process(dense, tasks, f"layout.{axis}=2")[-1])["results"], by_one_process)


def test_replicas_that_were_killed_go_on(dense, tasks, by_one_process, tmp_path):
    """Killed with the first answers kept; the second run asks for fewer, and finds the same."""
    words = (*command(dense, tasks), "layout.data_parallel=2", "--resume", tmp_path / "kept")
    process = start_cli(*words, start_new_session=True)
    wait_until(lambda: any(answers(tmp_path)) or process.poll() is not None, 120)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = sum(answers(tmp_path))
    again = in_a_process(dense, tasks, "layout.data_parallel=2", "--resume", tmp_path / "kept")
    assert close(json.loads(again[-1])["results"], by_one_process)
    assert 0 < kept < sum(answers(tmp_path))


def answers(folder):
    """How many answers each file keeps; it may be half made."""
    for path in folder.glob("kept-*"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
            yield database.execute("select count(*) from unnamed").fetchone()[0]


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def close(found, expected):
    """The same names and texts, and numbers within 1e-4: sums are taken in another order."""
    return found.keys() == expected.keys() and all(
        found[task].keys() == figures.keys()
        and all(
            found[task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
            for name, value in figures.items()
        )
        for task, figures in expected.items()
    )


def test_lm_eval_opens_a_checkpoint_by_the_name_of_the_model(dense):
    """As `simple_evaluate(model="llada", model_args=…)` does."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from llada_megatron.launch.evaluation import harness_model

    assert get_model("llada") is harness_model.HarnessModel
    asked, own = {"checkpoint": str(dense), "samples": 8}, {"batch_size": None, "max_batch_size": None, "device": None}
    model = get_model("llada").create_from_arg_obj(asked, own)
    try:
        ((nats, greedy),) = model.loglikelihood([Instance("loglikelihood", {}, ("one and one is", " two"), 0)])
    finally:
        model.close()
    assert nats < 0 and greedy is False
    with pytest.raises(ConfigError, match="which checkpoint"):
        harness_model.HarnessModel()


def test_unknown_tasks_are_refused(dense, capsys, monkeypatch):
    import lm_eval.tasks

    own = SimpleNamespace(all_tasks=["another"])  # reading those of lm_eval takes seven seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: own)
    code, _, err = run_cli(capsys, "eval", "harness", dense, "--tasks", "no_such_task")
    assert (code, "no such task" in err) == (2, True)


def test_wrong_command_lines(dense, tmp_path, capsys):
    for words, told in [
        (("--shots", -1), "--shots -1: at least 0"),
        (("--limit", 0), "--limit 0: at least 1"),
        (("--task-folder", tmp_path / "none"), "there is no such folder"),
        (("--template", "llada"), "--template belongs to --chat-template"),
        (("--output", tmp_path / "none" / "x.json"), "there is no such folder"),
        (("--published", "llada-8b-base"), "--tasks any: nothing published for LLaDA-8B-Base; arc_challenge"),
        (("--published", "llada-8b-base", "--block-length", 8), "--block-length: --published NAME has its own"),
        (("--published", "llada-8b-base", "--shots", 0), "--shots: --published NAME has its own settings"),
        (("--published", "llada-8b-base", "--samples", 8), "--samples: --published NAME has its own settings"),
        (("--published", "llada-8b-base", "--guidance", 0), "--guidance: --published NAME has its own settings"),
        (("--published", "llada-8b-base", "--temperature", 1), "--temperature: --published NAME has its own settings"),
        (("schedule.steps=8", "--published", "llada-8b-base"), "schedule.steps=8: --published NAME has its own"),
        (("--published", "none"), "no list of published figures 'none'"),
    ]:
        code, _, err = run_cli(capsys, "eval", "harness", dense, "--tasks", "any", *words)
        assert (code, told in err, len(err.splitlines())) == (2, True, 1), err
    code, _, err = run_cli(capsys, "eval", "harness", dense)
    assert (code, "Give --tasks A,B or --published NAME" in err) == (2, True)


PUBLISHED = """
model: a model
source: a report
rows:
  - {task: own_choice, shots: 0, samples: 8, guidance: 0.5, metrics: [acc, acc_norm], figures: [CHOICE]}
  - {task: own_written, shots: 0, new_tokens: 3, metrics: [exact_match], figures: [0.4, 90]}
"""


def test_published_figures_are_measured_with_their_settings_and_compared(dense, tasks, tmp_path, capsys):
    file = tmp_path / "published.yaml"
    rows = (tasks / "questions.jsonl").read_text().splitlines(keepends=True)[:2]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(rows))
    for name, text in (("own_choice", CHOICE), ("own_written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=folder / "questions.jsonl"))
    words = (dense, "--published", file, "--task-folder", folder, "--output", tmp_path / "out.json")
    for figures, code in (("999", 1), ("0, 50, 100", 0)):  # of two documents nothing else can be
        file.write_text(PUBLISHED.replace("CHOICE", figures))
        found, out, err = run_cli(capsys, "eval", "harness", *words, "--json")
        assert found == code, err
        rows = json.loads(out.splitlines()[-1])["rows"]
        assert [row["measured"].keys() for row in rows] == [{"acc", "acc_norm"}, {"exact_match"}]
        assert [row["accepted"] for row in rows] == [code == 0, True]
        assert ("REJECTED     own_choice" in out) == (code == 1)
        assert "accepted     own_written" in out and "published 0.4 or 90" in out
    choice, written = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert choice["protocol"]["likelihood"]["guidance"] == 0.5
    assert written["protocol"]["sampling"]["block_length"] == written["protocol"]["max_new_tokens"] == 3
    found, out, _ = run_cli(capsys, "eval", "harness", *words, "--limit", 1, "--tasks", "own_choice")
    assert (found, "not decided  own_choice" in out) == (1, True)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("own_unsafe", CHOICE + "unsafe_code: true\n", "runs programs that the model writes"),
        ("own_broken", CHOICE, "row 20"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(dense, tasks, tmp_path, capsys, name, text, told):
    broken = "{\n" if name == "own_broken" else ""
    (tmp_path / "questions.jsonl").write_text((tasks / "questions.jsonl").read_text() + broken)
    (tmp_path / f"{name}.yaml").write_text(text.format(name=name, data=tmp_path / "questions.jsonl"))
    code, _, err = run_cli(capsys, "eval", "harness", dense, "--tasks", name, "--task-folder", tmp_path)
    assert (code in (1, 2), told in err.splitlines()[-1]) == (True, True), err


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "AssertionError"])
def test_a_task_that_lacks_a_package_costs_no_measurement(dense, tasks, tmp_path, capsys, monkeypatch, error):
    """As lm_eval's minerva_math without sympy, or beside another antlr4."""
    from llada_megatron.parallel.evaluation.served_model import ServedModel

    monkeypatch.setattr(ServedModel, "log_likelihoods", lambda *_: pytest.fail("something was measured before"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "lacking.py").write_text(f"raise {error}('please install sympy')\n")
    text = CHOICE.replace('"{{{{question}}}}"', "!function lacking.doc_to_text")
    for name, form in (("own_choice", CHOICE), ("own_written", text)):
        (folder / f"{name}.yaml").write_text(form.format(name=name, data=tasks / "questions.jsonl"))
    (tmp_path / "published.yaml").write_text(PUBLISHED.replace("CHOICE", "50"))
    words = (dense, "--published", tmp_path / "published.yaml", "--task-folder", folder)
    code, _, err = run_cli(capsys, "eval", "harness", *words)
    assert code == 2 and "own_written" in err.splitlines()[-1], err
    assert "pip install 'lm_eval[math]': please install sympy" in err.splitlines()[-1]


def test_what_was_measured_is_written_before_the_next_row(dense, tasks, tmp_path, capsys, monkeypatch):
    from llada_megatron.parallel.evaluation.served_model import ServedModel

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ServedModel, "generate", interrupted)
    file = tmp_path / "published.yaml"
    file.write_text(PUBLISHED.replace("acc, acc_norm", "f1").replace("CHOICE", "50"))
    words = (dense, "--published", file, "--task-folder", tasks, "--output", tmp_path / "out.json")
    code, _, _ = run_cli(capsys, "eval", "harness", *words, "--limit", 1)
    (part,) = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert code == 130 and part["results"]["own_choice"]["alias"] == "own_choice"
    code, out, _ = run_cli(capsys, "eval", "harness", *words, "--limit", 1, "--tasks", "own_choice")
    assert (code, "not measured own_choice" in out, "lm_eval gave none of f1" in out) == (1, True, True)


def test_text_is_cut_at_the_first_stop_text():
    from llada_megatron.launch.evaluation.harness_model import cut_at

    assert cut_at("a\nb.c", [".", "\n", ""]) == "a"
    assert cut_at("abc", []) == "abc"


def test_a_conversation_keeps_its_special_tokens(tmp_path):
    from lm_eval.api.instance import Instance

    from llada_megatron.launch.evaluation.harness_model import HarnessModel
    from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
    from llada_megatron.parallel.evaluation.served_model import ServedModel
    from llada_megatron.parallel.sampling.chat_template import LLADA
    from llada_megatron.parallel.sampling.settings import Settings

    chatty = checkpoint(tmp_path, template=LLADA)
    with open_checkpoint(chatty) as loaded:
        served = ServedModel(loaded, LikelihoodProtocol(samples=8), Settings(checkpoint=str(chatty)))
        model = HarnessModel(served)
        text = model.apply_chat_template([{"role": "user", "content": "hi <|eot_id|>"}])
        special = served.tokenizer.special_ids
        pair = model._pair(Instance("loglikelihood", {}, (text, "ok"), 1))
        assert pair.context[:2] == (special["<|startoftext|>"], special["<|start_header_id|>"])
        assert pair.context.count(special["<|eot_id|>"]) == 1, "the one of the message is ordinary text"
        assert (pair.answer, pair.option) == (tuple(served.tokenizer.encode("ok")), 1)
        (written,) = model.generate_until([Instance("generate_until", {}, (text, {"max_gen_toks": 3}), 0)])
        assert isinstance(written, str)
        begun = model.apply_chat_template(
            [{"role": "user", "content": "hi <|eot_id|>"}, {"role": "assistant", "content": "The <|eot_id|>"}], False
        )
        assert begun == text + "The <|eot_id|>", "an answer that the task begins"
        assert model._ids(begun) == [*pair.context, *served.tokenizer.encode("The <|eot_id|>")]
        asked = Instance("generate_until", {}, (text, {"max_gen_toks": 3}), 0)
        again = [model._prompt(asked, times).number for times in (0, 0, 1)]
        assert again[0] == again[1] != again[2], "draws of a question that is asked several times differ"
        ids = [*served.tokenizer.encode("ok"), special["<|eot_id|>"], *served.tokenizer.encode("junk")]
        assert model._answer(SimpleNamespace(written=[ids], new="ok junk")) == "ok", "the turn ended there"
        drawn = Instance("generate_until", {}, (text, {"do_sample": True, "temperature": 0.7}), 0)
        with pytest.raises(ConfigError, match="say --temperature 0.7"):
            model.generate_until([drawn])
