"""A run that an earlier version of this program saved goes on, and is read by everything that reads checkpoints.

`earlier_run.tar.xz` holds the prepared set of a tiny run and its checkpoint of step 2, as version 0.1.0 wrote them on
two ranks with two experts each. Keys in files on disk keep their names, whatever attributes of this program are called.
"""

import json
import os
import tarfile
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config import from_dict
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of, weights_to_start_from
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint
from tests.ranks import run_ranks


@pytest.fixture
def earlier(tmp_path):
    """The directory with the set and, in `before`, the run."""
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def _go_on(directory, run):
    """Train to the end; the step at which this began, the losses before it and the losses that came."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    os.chdir(directory)
    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    first, known = trainer.state.step, list(trainer.state.history.losses)
    trainer.train(lambda: False)
    return first, known, list(trainer.state.history.losses)


def _run(earlier, **changes):
    (path,) = find_checkpoints(earlier / "before")
    values = json.loads((path / "manifest.json").read_text())["facts"]["run"]
    values["training"]["steps"] = 4
    values["layout"] |= {"data_parallel": 1, "expert_parallel": 1}
    return from_dict(RunConfig, values | changes)


def test_the_manifest_is_read(earlier):
    (path,) = find_checkpoints(earlier / "before")
    manifest = manifests.read(path)
    manifests.verify_sizes(path, manifest)
    assert [manifests.verify_digest(path, name, stated) for name, stated in manifest.files.items()] == [None] * 5
    assert run_of(path).training.steps == 2
    started = _run(earlier, checkpoint={"load": str(earlier / "before")})
    assert weights_to_start_from(started) == path


def test_the_run_goes_on_where_it_stopped(earlier):
    ((first, known, losses),) = run_ranks(_go_on, 1, earlier, _run(earlier))
    assert first == 2 and losses[:2] == known and len(losses) == 4
    assert all(5.0 < loss < 6.5 for loss in losses)
    (newest, *_) = find_checkpoints(earlier / "before")
    written = json.loads((newest / "manifest.json").read_text())
    assert newest.name == "step-00000004"
    assert (written["facts"]["step"], written["facts"]["consumed_samples"]) == (4, 16)


def test_it_is_exported_with_its_tokenizer_and_a_card(earlier, monkeypatch):
    monkeypatch.chdir(earlier)  # the path of the data, and so of the tokenizer, is relative
    summary = export_checkpoint(Path("before"), Path("exported"), ExportOptions())
    assert summary["format"] == "llada2" and (earlier / "exported/tokenizer.model").is_file()
    assert "| steps | 2 of 2 |" in (earlier / "exported/README.md").read_text()
