"""`llada eval infill`: a table of every length and writer, and what is said of wrong input."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.launch.evaluation.infill_command import InfillWork
from llada_megatron.llada_moe import objectives
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data import training_data
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.parallel.checkpoint import loaded_model
from llada_megatron.parallel.evaluation import query_scorer
from llada_megatron.parallel.sampling.settings import Settings
from tests.corpora import model_for, prepared_set
from tests.launch.sampling.checkpoints import run_cli

TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(3):\n    print(i)\n", "a = [1, 2, 3, 4, 5, 6, 7]\n"]


def test_figures_of_every_length_and_writer(dense, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words = ("--texts", tmp_path / "texts.jsonl", "--lengths", "1,4", "--spans", 2, "--samples", 8, "--python")
    code, out, err = run_cli(
        capsys, "eval", "infill", dense, *words, "--find-length", "--json", "--output", tmp_path / "o.json"
    )
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    rows = {(row["writer"], row["length"]): row for row in found["rows"]}
    assert set(rows) == {
        (writer, length) for writer in ("this model", "this model, length found", "unigram") for length in (1, 4)
    }
    assert all(row["spans"] == 2 and row["bits_per_token"]["value"] > 0 for row in rows.values())
    assert all(row[key]["error"] is not None for row in rows.values() for key in ("exact", "bits_per_token"))
    assert rows["this model", 4]["parses"] is not None
    assert (rows["this model", 4]["length_right"], rows["this model, length found", 4]["length_right"] is None) == (
        None,
        False,
    )
    assert json.loads((tmp_path / "o.json").read_text()) == found
    assert found["protocol"]["source"] == str(tmp_path / "texts.jsonl")
    assert "the true length of a span is given, except" in out
    assert "8 samples in strata of 8" in out


def test_wrong_input(dense, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "ab"}\n')
    for words, code, told in [
        (("--texts", file, "--lengths", "0"), 2, "--lengths 0: whole numbers from 1"),
        (("--texts", file, "--lengths", "4"), 1, "no text has 12 tokens"),
        (("--texts", file, "--spans", 0), 2, "--spans 0: at least 1"),
        (("--texts", tmp_path / "none"), 1, "No such file"),
        ((), 2, "give --texts FILE"),
        (("--texts", file, "--lengths", "1,999", "--find-length"), 2, "a gap of 999 tokens; the model takes"),
        (("--texts", file, "--output", tmp_path), 2, "give a file in a folder that there is"),
        (("--texts", file, "--output", file), 2, "name another place"),
        (("--texts", file, "--autoregressive", tmp_path / "none"), 1, "there is no checkpoint"),
    ]:
        found, _, err = run_cli(capsys, "eval", "infill", dense, *words)
        assert (found, told in err) == (code, True), err


def work(**values):
    given = dict.fromkeys(("texts", "file", "autoregressive")) | {"windows": 8, "lengths": [1], "spans": 1}
    given |= {"python": False, "find_length": False, "candidates": 1}
    return InfillWork(settings=Settings(checkpoint="none"), protocol=LikelihoodProtocol(), **given | values)


class ThreeWindows:
    """Held-out data whose epochs have three windows."""

    def __init__(self, run, split, objective):
        assert split == "validation"

    def locate(self, number):
        return SimpleNamespace(epoch=number // 3)

    def batch(self, numbers):
        return SimpleNamespace(labels=torch.tensor([[10 + number % 3] for number in numbers]))


def test_every_held_out_window_is_read_once(monkeypatch):
    own = [None]
    monkeypatch.setattr(training_data, "TrainingData", ThreeWindows)
    monkeypatch.setattr(objectives, "make_objective", lambda *_: SimpleNamespace(samples=lambda run, split: own[0]))
    run = SimpleNamespace(
        model=SimpleNamespace(max_sequence_length=8),
        data=SimpleNamespace(sets=[1]),
        objective=None,
        training=SimpleNamespace(sequence_length=1),
    )
    loaded = SimpleNamespace(run=run, path="a checkpoint")
    assert work()._windows(loaded, None) == [(10,), (11,), (12,)]
    assert work(windows=2)._windows(loaded, None) == [(10,), (11,)]
    own[0] = "conversations"
    with pytest.raises(ConfigError, match="a checkpoint: .* give --texts FILE"):
        work()._windows(loaded, None)


def test_a_baseline_with_another_tokenizer_is_refused(monkeypatch):
    model = SimpleNamespace(vocab_size=272)
    other = SimpleNamespace(run=SimpleNamespace(model=model), metadata={"tokenizer": {"sha256": "b"}})
    monkeypatch.setattr(loaded_model, "load_checkpoint", lambda *_: other)
    monkeypatch.setattr(query_scorer, "kind_of", lambda _: SimpleNamespace(fills_masks=False))
    served = SimpleNamespace(model=model, loaded=SimpleNamespace(metadata={"tokenizer": {"sha256": "a"}}))
    with pytest.raises(ConfigError, match="--autoregressive x: another tokenizer than the model's"):
        work(autoregressive="x")._baseline(served, [])


def test_held_out_windows_hold_their_text_once(tmp_path):
    """Not as block diffusion reads it, where the second copy tells what stood in a span of the first."""
    _, tokenizer = prepared_set(tmp_path)
    run = RunConfig(
        model=model_for(tokenizer, "tiny-dense"),
        training=TrainingConfig(steps=1, sequence_length=32, global_batch_size=4),
        data=DataConfig(sets=[DataSetConfig(path=str(tmp_path / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        objective=BlockDiffusionConfig(kind="block_diffusion", block_size=8),
        output_dir=str(tmp_path),
    )
    asked = SimpleNamespace(texts=None, python=False, windows=2)
    windows = InfillWork._windows(asked, SimpleNamespace(run=run), None)
    assert [len(window) for window in windows] == [32, 32] and run.model.mask_token_id not in windows[0]
