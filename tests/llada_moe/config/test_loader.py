"""YAML to typed configuration: every mistake is refused at its place, and no surprise of YAML gets through."""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import ModelConfig, RunConfig, dump_yaml, from_dict, load_model, load_run, to_dict
from llada_megatron.llada_moe.errors import ConfigError

RUN = """\
model: tiny-moe
training:
  steps: 100
  sequence_length: 64
  global_batch_size: 8
data:
  sets:
    - path: data/a
optimizer:
  learning_rate:
    peak: 1e-4
output_dir: runs/x
"""
MODEL = """\
family: llada
num_layers: 2
hidden_size: 32
ffn_hidden_size: 64
num_attention_heads: 2
num_key_value_heads: 2
head_dim: 16
vocab_size: 64
max_sequence_length: 64
mask_token_id: 3
eos_token_id: 2
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file under tmp_path, which becomes the current directory; returns its relative name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write_file


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_a_run_with_a_named_model(write):
    run = load_run(write(RUN))
    assert run.model == load_model("tiny-moe")
    assert run.optimizer.learning_rate.peak == 1e-4
    assert run.layout.world_size == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  steps: 100", "  stepz: 100", "run.yaml:3: training.stepz: unknown key; did you mean 'steps'?"),
        (
            "output_dir: runs/x",
            "output_dir: x\ntensor_parallel: 2",
            "run.yaml:13: tensor_parallel: unknown key; did you mean 'layout.tensor_parallel'?",
        ),
        ("  steps: 100\n", "", "run.yaml:2: training.steps: missing; this key is required"),
        ("output_dir: runs/x\n", "", "run.yaml:1: output_dir: missing; this key is required"),
        ("steps: 100", "steps: 1e2", "run.yaml:3: training.steps: expected a whole number, found '1e2'; write 100"),
        (
            "steps: 100",
            "steps: '100'",
            "run.yaml:3: training.steps: expected a whole number, found the quoted text '100'; remove the quotes",
        ),
        ("steps: 100", "steps: 0x10", "run.yaml:3: training.steps: expected a whole number, found '0x10'"),
        ("steps: 100", "steps: 1:30", "run.yaml:3: training.steps: expected a whole number, found '1:30'"),
        ("steps: 100", "steps:", "run.yaml:3: training.steps: expected a whole number, found nothing"),
        ("steps: 100", "steps: [100]", "run.yaml:3: training.steps: expected a whole number, found a list"),
        (
            "peak: 1e-4",
            "peak: .inf",
            "run.yaml:11: optimizer.learning_rate.peak: expected a finite number such as 0.1 or 1e-4, found '.inf'",
        ),
        (
            "  steps: 100",
            "  precision: fp23\n  steps: 100",
            "run.yaml:3: training.precision: expected one of fp32, bf16, found 'fp23'; did you mean 'fp32'?",
        ),
        (
            "    - path: data/a",
            "    path: data/a",
            "run.yaml:7: data.sets: expected a list (lines that begin with `- `), found a mapping",
        ),
        (
            "    - path: data/a",
            "    - pathh: data/a",
            "run.yaml:8: data.sets.0.pathh: unknown key; did you mean 'path'?",
        ),
        (
            "output_dir: runs/x",
            "output_dir: runs/x\nlayout: 4",
            "run.yaml:13: layout: expected a mapping with the keys tensor_parallel",
        ),
        (
            "output_dir: runs/x",
            "output_dir: runs/x\nmodel: tiny-dense",
            "run.yaml:13: key 'model' is given twice (first at run.yaml:1); keep one",
        ),
        (
            "steps: 100",
            "steps: 100\n  steps: 200",
            "run.yaml:4: key 'steps' is given twice (first at run.yaml:3); keep one",
        ),
        (
            "output_dir: runs/x",
            "output_dir: !!python/name:os.system x",
            "run.yaml:12: YAML tags such as !!python/name:os.system are not supported",
        ),
        ("output_dir: runs/x", "output_dir: [runs/x", "run.yaml:13:1: not valid YAML"),
        ("output_dir: runs/x", "layout: &a\n  b: *a", "an alias refers to the mapping or list that contains it"),
        ("model: tiny-moe", "model: tiny-mo", "run.yaml:1: no model 'tiny-mo'; did you mean 'tiny-moe'?"),
    ],
)
def test_mistakes_are_refused_at_their_place(write, before, after, message):
    assert before in RUN
    assert message in refusal(write(RUN.replace(before, after)))


def test_all_mistakes_are_shown_at_once(write):
    text = refusal(write(RUN.replace("steps: 100", "stepz: 100").replace("peak: 1e-4", "peak: high")))
    assert [line.split(":")[1] for line in text.splitlines()] == ["3", "2", "11"]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "True", "FALSE", "y", "1", '"true"'])
def test_only_true_and_false_are_truth_values(write, word):
    text = refusal(write(RUN + f"layout:\n  sequence_parallel: {word}\n"))
    assert text.startswith("run.yaml:14: layout.sequence_parallel: expected true or false, found ")


def test_surprises_of_yaml_read_as_a_person_reads_them(write):
    text = (
        RUN.replace("data/a", "no")
        .replace("output_dir: runs/x", "output_dir: 010")
        .replace("steps: 100", "steps: 0100")
    )
    run = load_run(write(text.replace("peak: 1e-4", "peak: 1")))
    assert (run.data.sets[0].path, run.output_dir, run.training.steps) == ("no", "010", 100)
    assert run.optimizer.learning_rate.peak == 1.0 and isinstance(run.optimizer.learning_rate.peak, float)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000.0), ("+2", 2.0)]
)
def test_floats_as_people_write_them(write, text, value):
    assert load_run(write(RUN.replace("peak: 1e-4", f"peak: {text}"))).optimizer.learning_rate.peak == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"- a\n", "expected `key: value` lines"),
        (b"\xff\xfe", "not a text file"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"? [a]\n: b\n", "a key must be a single word"),
        (b"a: \x07\n", "not valid YAML"),
        (b"a: 1\n\tb: 2\n", "not valid YAML"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert message in refusal(path)


def test_a_missing_file_names_its_neighbour(write):
    write(RUN, "demo.yaml")
    assert refusal("demmo.yaml") == "demmo.yaml: no such configuration file; did you mean 'demo.yaml'?"


def test_a_run_by_name_is_looked_for_here_then_in_the_package(write):
    assert load_run("demo").output_dir == "runs/demo"
    write(RUN, "demo.yaml")
    assert load_run("demo") == load_run("demo.yaml")


def test_an_unknown_run_lists_the_known_ones(write):
    assert refusal("qqqq").startswith("no run 'qqqq'; known: ar-to-diffusion, demo, ")
    assert refusal("dmeo") == "no run 'dmeo'; did you mean 'demo'?"
    assert refusal("runs/qqqq") == "runs/qqqq: no such configuration file"


def test_overrides(write):
    path = write(RUN)
    run = load_run(
        path,
        ["training.steps=7", "model=tiny-dense", "model.num_layers=2", "data.sets.0.weight=2", "checkpoint.load=a/b"],
    )
    assert (run.training.steps, run.model.moe, run.model.num_layers) == (7, None, 2)
    assert run.data.sets[0].weight == 2.0 and run.checkpoint.load == "a/b"
    assert load_run(path, ["data.sets=[{path: x}, {path: y, weight: 3}]"]).data.sets[1].weight == 3.0
    assert load_run(path, ["checkpoint.load=a", "checkpoint.load="]).checkpoint.load is None
    assert load_run(path, ["output_dir=a=b"]).output_dir == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "override 'training.steps': write it as key.path=value"),
        ("training..steps=1", "override 'training..steps=1': write it as key.path=value"),
        (
            "layout.tensor_paralel=2",
            "override layout.tensor_paralel=2: layout.tensor_paralel: unknown key; did you mean 'tensor_parallel'?",
        ),
        ("training.steps=many", "override training.steps=many: training.steps: expected a whole number, found 'many'"),
        ("data.sets.1.path=x", "override data.sets.1.path=x: '1' is not an item of this list (0 to 0)"),
        ("output_dir=[a", "override output_dir=[a: not valid YAML"),
        (
            "layout.tensor_parallel=3",
            "override layout.tensor_parallel=3: layout.tensor_parallel: 3 does not divide num_attention_heads 4",
        ),
        ("model=nothing-like-it", "override model=nothing-like-it: no model 'nothing-like-it'; known: llada-8b"),
    ],
)
def test_overrides_that_cannot_work_are_named(write, override, message):
    assert message in refusal(write(RUN), override)


def test_a_model_may_be_a_mapping_a_path_or_changes_to_a_base(write):
    write(MODEL, "models/mine.yaml")
    write(MODEL, "elsewhere.yaml")
    own = textwrap.indent(MODEL, "  ")
    for model in ("mine", "elsewhere.yaml", "\n" + own):
        assert load_run(write(RUN.replace("tiny-moe", model), "runs/run.yaml")).model.hidden_size == 32
    changed = load_run(write(RUN.replace("tiny-moe", "\n  base: tiny-moe\n  num_layers: 2\n  moe:\n    top_k: 2")))
    assert changed.model.num_layers == 2 and changed.model.moe.top_k == 2 and changed.model.moe.num_experts == 8


def test_positions_of_a_base_survive(write):
    write(MODEL.replace("num_layers: 2", "num_layers: two"), "models/mine.yaml")
    assert refusal(write(RUN.replace("tiny-moe", "mine"))).startswith(
        "models/mine.yaml:2: model.num_layers: expected a whole number"
    )
    write("base: loop\n", "models/loop.yaml")
    assert "'loop' is its own base" in refusal(write(RUN.replace("tiny-moe", "loop")))


def test_manifests_come_back_unchanged_and_keep_old_ones_readable(write):
    run = load_run(write(RUN))
    assert from_dict(RunConfig, to_dict(run)) == run
    old = to_dict(run)
    del old["training"]["logits_chunk_mb"]
    assert from_dict(RunConfig, old) == run
    with pytest.raises(ConfigError, match=r"^layot: unknown key; did you mean 'layout'\?"):
        from_dict(RunConfig, {**old, "layot": {}})


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    path=st.text(
        st.characters(
            codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\ufeff\ufffe\uffff"
        ),
        min_size=1,
    ),
    weight=st.floats(1e-30, 1e30),
    load=st.none() | st.sampled_from(["null", "~", "no", "1e-4", "010", "2001-01-01", "a: b", "- a"]),
)
def test_what_is_dumped_reads_back_unchanged(tmp_path_factory, path, weight, load):
    folder = tmp_path_factory.mktemp("dump")
    (folder / "a.yaml").write_text(RUN, encoding="utf-8")
    values = to_dict(load_run(folder / "a.yaml"))
    values["data"]["sets"][0] |= {"path": path, "weight": weight}
    values["checkpoint"]["load"] = load
    run = from_dict(RunConfig, values)
    assert run.data.sets[0].path == path and run.checkpoint.load == load
    (folder / "b.yaml").write_text(dump_yaml(run), encoding="utf-8")
    assert load_run(folder / "b.yaml") == run


def test_models_round_trip(tmp_path):
    for name in ("llada2-flash", "tiny-dense"):
        model = load_model(name)
        path = Path(tmp_path, f"{name}.yaml")
        path.write_text(dump_yaml(model), encoding="utf-8")
        assert load_model(path) == model == from_dict(ModelConfig, to_dict(model))


def test_a_recovery_policy_by_name_by_path_and_with_a_base(write):
    write("not_finite: rollback\nlearning_rate_factor: 0.5\n", "recovery/half.yaml")
    write("base: half\nmax_decisions: 4\n", "recovery/four.yaml")
    run = write(RUN + "recovery: half\n", "runs/run.yaml")
    assert load_run(run).recovery.learning_rate_factor == 0.5
    changed = load_run(run, ["recovery.max_decisions=3", "recovery=four"]).recovery
    assert (changed.not_finite, changed.max_decisions) == ("rollback", 3)
    assert load_run(run, ["recovery=recovery/four.yaml"]).recovery.max_decisions == 4
    within = write(RUN + "recovery:\n  base: half\n  spike: skip\n", "runs/within.yaml")
    assert load_run(within).recovery.spike == "skip"
    assert load_run(run, ["recovery.retry=false"]) == from_dict(
        RunConfig, to_dict(load_run(run, ["recovery.retry=false"]))
    )


def test_an_unknown_recovery_policy_lists_the_known_ones(write):
    path = write(RUN + "recovery: qqqq\n")
    assert refusal(path) == "run.yaml:13: no recovery policy 'qqqq'; known: llada"
    assert "no recovery policy 'lada'; did you mean 'llada'?" in refusal(path, "recovery=lada")


def test_a_configuration_from_before_recovery_takes_the_defaults(write):
    values = to_dict(load_run(write(RUN)))
    del values["recovery"]
    assert from_dict(RunConfig, values).recovery.not_finite == "stop"


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 50,000 values, which no configuration has"),
        ("x: " + "[" * 60 + "]" * 60, "2?: ?mappings and lists are nested deeper"),
        ("x: " + "[" * 5_000, "nested deeper"),
        ("x: " + "{a: " * 5000 + "}" * 5000, "nested deeper"),
        ("x: &x [*x]", "contains it"),
        ("x: " + "y" * 2**20, "bytes are too many for a configuration file"),
        ("num_layers: 1" + "0" * 400, "num_layers: .* is too large: the largest whole number is 92233"),
        ("num_layers: " + "9" * 5000, "num_layers: .{,120} is too large"),
        ("num_layers: 9223372036854775808", "is too large"),
        ("num_layers: 2000000", "num_layers: 2000000 must be at most 10000"),
        ("rope_theta: 1" + "0" * 400, "rope_theta: expected a finite number such as 0.1 or 1e-4, found .{,90}$"),
        ("family: " + "x" * 5000, "family: expected one of .{,200}$"),
        ("a.b: \x1b", "base.yaml:1: not valid YAML"),
    ],
)
def test_what_would_take_the_machine_is_one_line(tmp_path, text, said):
    lines = text if "num_layers" in text or "rope" in text or "family" in text else f"{text}\n"
    (tmp_path / "base.yaml").write_text(lines + ("\nbase: tiny-moe\n" if ":" in lines and "[" not in lines else ""))
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_model(tmp_path / "base.yaml")
    assert any(re.search(said, line) for line in str(error.value).splitlines()), str(error.value)[:500]
    assert max(map(len, str(error.value).splitlines())) < 400
    assert time.process_time() - began < 10


def test_an_override_may_have_no_endless_path():
    with pytest.raises(ConfigError, match="write it as key.path=value"):
        load_model("tiny-moe", [".".join(["moe"] * 3000) + "=1"])
