"""A run's folder is enough to use its model anywhere, and one that goes away in mid-run is noticed and made anew."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.set_manifest import read_manifest
from llada_megatron.llada_moe.errors import DataError, ResourceError
from llada_megatron.parallel.checkpoint.search import tokenizer_folder
from llada_megatron.parallel.training.run_folder import RunFolder, tokenizer_to_carry
from tests.corpora import model_for, prepared_set
from tests.ranks import run_ranks


def train(run, at_step=None, folder=None):
    """Train on this rank, in `folder` if given; the run's folder goes away when `at_step` steps are done, and again
    after the last save."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    if folder is not None:
        os.chdir(folder)
    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    said, tell, end = [], trainer.reporter.message, trainer.saver.end
    trainer.reporter.message = lambda text: (said.append(text), tell(text))

    def stop():
        if trainer.state.step == at_step:
            shutil.rmtree(run.output_dir)
        return False

    def end_and_lose(*arguments):
        end(*arguments)
        trainer.saver.end = end
        if at_step is not None:
            shutil.rmtree(run.output_dir)

    trainer.saver.end = end_and_lose
    return trainer.train(stop), said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    _, tokenizer = prepared_set(root)
    return root, RunConfig(
        model=model_for(tokenizer, "tiny-dense"),
        training=TrainingConfig(steps=6, sequence_length=32, global_batch_size=2, precision="fp32"),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        checkpoint=CheckpointConfig(interval=100),
        logging=LoggingConfig(interval=1, tensorboard=True),
        output_dir=str(root / "run"),
    )


def test_a_run_carries_its_tokenizer_wherever_it_and_its_set_go(prepared, tmp_path, monkeypatch, capsys):
    root, run = prepared
    run = dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, steps=1),
        data=dataclasses.replace(run.data, sets=[DataSetConfig(path="set")]),
        checkpoint=dataclasses.replace(run.checkpoint, copy_to="copies"),
        output_dir="carried",
    )
    run_ranks(train, 1, run, None, root)
    hidden = [path.rename(path.with_name(f"away-{path.name}")) for path in root.glob("set.*")]
    (root / "carried").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["watch", "moved", "--prompt", "ab", "--max-new-tokens", "2"]) == 0
        assert main(["sample", str(root / "copies"), "--prompt", "ab", "--max-new-tokens", "2"]) == 0
        assert main(["convert", "export", "moved", "exported", "--workers", "1"]) == 0
    finally:
        for path in hidden:
            path.rename(path.with_name(path.name.removeprefix("away-")))
    assert {"tokenizer.json", "tokenizer.model"} <= {path.name for path in (tmp_path / "exported").iterdir()}
    assert "tokenizer is not" not in capsys.readouterr().err


def test_the_files_beside_a_tokenizer_are_carried_from_the_weights_that_a_run_starts_from(prepared, tmp_path):
    _, run = prepared
    facts = read_manifest(run.data.sets[0].path).tokenizer
    weights = tmp_path / "import/checkpoints/step-00000000"
    weights.mkdir(parents=True)
    folder = tmp_path / "import/tokenizer"
    folder.mkdir()
    shutil.copy(f"{run.data.sets[0].path}.tokenizer.model", folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_folder(weights) == folder
    carried = tokenizer_to_carry(run, facts, [tmp_path / "nowhere", folder])
    assert carried.keys() == {"tokenizer.model", "chat_template.jinja"}
    (folder / "tokenizer.json").write_text("{}")  # another tokenizer, which is the one that would be read
    assert tokenizer_to_carry(run, facts, [folder]).keys() == {"tokenizer.model"}


def test_a_set_without_its_tokenizer_or_with_another_is_refused(prepared, tmp_path):
    _, run = prepared
    facts = dataclasses.replace(read_manifest(run.data.sets[0].path).tokenizer, file="other.model")
    run = dataclasses.replace(run, data=DataConfig(sets=[DataSetConfig(path=str(tmp_path / "set"))]))
    with pytest.raises(DataError, match=r"other.model is missing"):
        tokenizer_to_carry(run, facts, [])
    (tmp_path / "other.model").write_bytes(b"other")
    with pytest.raises(DataError, match=r"other.model is not the tokenizer that the set was prepared with"):
        tokenizer_to_carry(run, facts, [])


def test_a_folder_that_goes_away_is_made_anew_with_a_checkpoint(prepared, tmp_path):
    """In the middle of the run, and after its last save."""
    _, run = prepared
    out = tmp_path / "run"
    run = dataclasses.replace(run, output_dir=str(out))
    ((result, said),) = run_ranks(train, 1, run, 2)
    warnings = [text for text in said if "config.yaml, tokenizer/tokenizer.model" in text and "went away" in text]
    assert [text.partition(":")[0] for text in warnings] == ["step 3", "step 6"]
    saved = [text.partition(",")[0] for text in said if text.startswith("saved")]
    assert saved == ["saved step 3", "saved step 6", "saved step 6"]
    assert load_run(out / "config.yaml") == run
    assert (out / "tokenizer/tokenizer.model").is_file() and os.listdir(out / "tensorboard")
    assert (out / "metrics.jsonl").is_file()
    manifest = json.loads((out / "checkpoints/step-00000006/manifest.json").read_text())
    assert manifest["facts"]["step"] == 6 and result["checkpoint"] == str(out / "checkpoints/step-00000006")


def test_a_file_system_that_went_away_is_not_written_around(prepared, tmp_path, monkeypatch):
    _, run = prepared
    run = dataclasses.replace(run, output_dir=str(tmp_path / "run"))
    folder = RunFolder(run, read_manifest(run.data.sets[0].path).tokenizer, None)
    folder.open(lambda text: None)
    assert folder.missing(None) == []
    assert folder.missing(tmp_path / "checkpoints/step-00000001") == ["checkpoints/step-00000001"]
    shutil.rmtree(run.output_dir)
    monkeypatch.setattr(folder, "_device", -1)
    with pytest.raises(ResourceError, match="no longer mounted"):
        folder.restore()
    assert not (tmp_path / "run").exists()


def test_a_configuration_with_the_same_values_keeps_its_comments(prepared, tmp_path):
    _, run = prepared
    run = dataclasses.replace(run, output_dir=str(tmp_path))
    folder = RunFolder(run, read_manifest(run.data.sets[0].path).tokenizer, None)
    folder.open(lambda text: None)
    commented = "# mine\n" + (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(commented)
    folder.open(lambda text: None)
    assert (tmp_path / "config.yaml").read_text() == commented
