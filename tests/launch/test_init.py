"""`llada init`: a run file that loads, says what every key means, and fits the machine; a schema for editors."""

import dataclasses
import json
import re

import jsonschema
import pytest
import yaml

from llada_megatron.cli import main
from llada_megatron.launch.layout_choice import USABLE, Machine, choose_layout, state_bytes
from llada_megatron.launch.run_template import start_values
from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.config.documentation import descriptions
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.named import MODELS, RUNS
from llada_megatron.llada_moe.config.parsing import key_paths
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ResourceError
from tests.corpora import prepared_set

GPUS = Machine(ranks=64, ranks_per_node=8, rank_bytes=80e9, precision="bf16")


@pytest.mark.parametrize("model", MODELS.names())
def test_every_model_gets_a_run_that_loads(model, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    assert main(["init", model, "--cluster", "dgx-h100", "--nodes", "8", "--output", str(file)]) == 0
    run = load_run(file)
    assert run.layout.world_size == 64 and run.model == load_model(model) and run.training.precision == "bf16"
    assert "next: llada inspect" in capsys.readouterr().err
    text = file.read_text()
    assert "# bf16 keeps fp32 main weights" in text and "# cut" not in text


def test_the_file_has_every_key_and_its_meaning(capsys):
    assert main(["init", "small-moe"]) == 0
    text = capsys.readouterr().out
    whole = "\n".join(line.replace("# ", "", 1) for line in text.splitlines())
    leaves = {path.rpartition(".")[2] for path in key_paths(RunConfig) if not path.startswith(("model.", "data.sets."))}
    assert {key for key in leaves if f"{key}:" not in whole} - {"step", "value"} == set()
    assert descriptions(TrainingConfig)["precision"] in " ".join(text.replace("#", "").split())
    assert "seed" not in descriptions(TrainingConfig)


def test_what_is_published_is_taken_over_and_what_is_not_is_said(tmp_path, capsys):
    command = ["--cluster", "dgx-h100", "--nodes", "8", "--output"]
    assert main(["init", "llada-8b", *command, str(tmp_path / "a.yaml")]) == 0
    shipped, made = load_run("llada-8b-pretrain"), load_run(tmp_path / "a.yaml")
    assert (made.optimizer, made.training, made.objective) == (shipped.optimizer, shipped.training, shipped.objective)
    assert (made.recovery, made.layout) == (shipped.recovery, dataclasses.replace(shipped.layout, data_parallel=32))
    assert "configs/runs/llada-8b-pretrain.yaml; see its comments" in (tmp_path / "a.yaml").read_text()
    assert main(["init", "llada-8b", "--cluster", "dgx-h100", "--output", str(tmp_path / "c.yaml")]) == 0
    smaller = load_run(tmp_path / "c.yaml").training  # of one node: more optimizer state on each GPU
    assert (smaller.recompute, smaller.micro_batch_size) == ("full", 1) and shipped.training.recompute == "none"
    assert main(["init", "llada2.2-mini", *command, str(tmp_path / "b.yaml")]) == 0
    assert "choose your own" in (tmp_path / "b.yaml").read_text()


def test_a_layout_cuts_no_more_than_the_memory_asks_for():
    assert choose_layout(load_model("llada-8b"), GPUS).tensor_parallel == 2
    assert choose_layout(load_model("tiny-dense"), GPUS) == LayoutConfig(data_parallel=64)
    flash = load_model("llada2-flash")
    layout = choose_layout(flash, GPUS)
    assert layout.world_size == 64 and layout.expert_parallel * layout.pipeline_parallel > 8
    assert state_bytes(flash, layout, "bf16") <= USABLE * GPUS.rank_bytes
    with pytest.raises(ResourceError, match="GB or more on each of 2 ranks"):
        choose_layout(flash, dataclasses.replace(GPUS, ranks=2))


def test_the_batch_divides_over_the_ranks():
    machine = dataclasses.replace(GPUS, ranks=48, rank_bytes=1e15)
    model = load_model("llada-8b")
    values, _ = start_values("llada-8b", model, machine, choose_layout(model, machine))
    assert values["training"]["global_batch_size"] % (48 * values["training"]["micro_batch_size"]) == 0
    assert values["training"]["global_batch_size"] >= load_run("llada-8b-pretrain").training.global_batch_size


def test_a_prepared_set_gives_the_vocabulary(tmp_path, monkeypatch, capsys):
    _, tokenizer = prepared_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "tiny-moe", "--data", "set", "--output", "run.yaml", "--schema", "run.schema.json"]) == 0
    run = load_run("run.yaml")
    assert (run.model.vocab_size, run.model.mask_token_id) == (tokenizer.vocab_size, tokenizer.mask_id)
    assert run.output_dir == "runs/run"
    assert (tmp_path / "run.yaml").read_text().startswith("# yaml-language-server: $schema=run.schema.json\n")
    assert main(["init", "tiny-moe", "--output", "run.yaml"]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err


def test_weights_to_start_from(tmp_path, monkeypatch, capsys):
    from llada_megatron.llada_moe.config import dump_yaml, to_dict
    from llada_megatron.parallel.checkpoint import manifest as manifests

    step = tmp_path / "import/checkpoints/step-00000000"
    step.mkdir(parents=True)
    run = load_run("small-diffusion")
    manifests.write(step, manifests.Manifest({"model": to_dict(run.model), "run": to_dict(run)}, {}))
    (tmp_path / "import/model.yaml").write_text(dump_yaml(run.model))
    monkeypatch.chdir(tmp_path)
    assert main(["init", "import", "--output", "run.yaml"]) == 0
    made = load_run("run.yaml")
    assert made.checkpoint.load == "import" and made.model == run.model


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    model = tmp_path / "model.yaml"
    model.write_text("base: tiny-dense\n")
    for words in (["--output", str(model)], ["--schema", str(model)]):
        assert main(["init", str(model), *words, "--overwrite"]) == 2
        assert "this command reads" in capsys.readouterr().err
    assert main(["init", str(model), "--output", str(tmp_path / "a"), "--schema", str(tmp_path / "a")]) == 2
    assert model.read_text() == "base: tiny-dense\n" and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "which MODEL? Its names: llada-8b"),
        (["small-moee"], "did you mean 'small-moe'?"),
        (["small-moe", "--nodes", "2"], "go with --cluster"),
        (["llada2-flash", "--cluster", "cpu"], "GB or more on each of 2 ranks"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, words, text):
    assert main(["init", *words]) in (1, 2)
    out, err = capsys.readouterr()
    assert text in err and out == "" and err.count("\n") == 1


def test_the_schema_knows_every_key_choice_and_requirement(tmp_path):
    assert main(["init", "--schema", str(tmp_path / "schema.json")]) == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert set(schema["required"]) == {"model", "training", "data", "optimizer", "output_dir"}
    training = schema["properties"]["training"]
    assert training["properties"]["precision"]["enum"] == ["fp32", "bf16"] and not training["additionalProperties"]
    assert training["properties"]["precision"]["description"].startswith("bf16 keeps fp32 main weights")
    assert training["properties"]["seed"] == {"type": "integer", "default": 0}
    assert "diffusion" in schema["properties"]["objective"]["properties"]["kind"]["enum"]
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    validator = jsonschema.Draft202012Validator(schema)
    for name in RUNS.names():
        content = yaml.load((RUNS.files(name)[0]).read_text(), Loader=_Yaml12)
        assert [error.message for error in validator.iter_errors(content)] == []
    content["training"]["stepz"] = 1
    assert "stepz" in next(validator.iter_errors(content)).message


class _Yaml12(yaml.SafeLoader):
    """Numbers as editors read them: PyYAML takes 1e-3 for text."""


_Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+e[-+]?[0-9]+"), list("-+0123456789."))
