"""What is refused before a process starts: too many ranks, too little memory, data that is not there."""

import dataclasses
import importlib
import shlex
from types import SimpleNamespace

import pytest

from llada_megatron import cli
from llada_megatron.launch import resources
from llada_megatron.llada_moe.config import dump_yaml, load_run
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.named import RUNS
from llada_megatron.llada_moe.errors import ConfigError, DataError, ResourceError
from llada_megatron.parallel.checkpoint import manifest
from llada_megatron.tools import prepare
from tests.corpora import prepared_set


@pytest.fixture
def demo():
    return load_run("configs/runs/demo.yaml")


def test_more_ranks_than_gpus():
    resources.check_gpus(8, 8)
    with pytest.raises(ResourceError, match="16 ranks, one per GPU, but 8 GPUs can be seen"):
        resources.check_gpus(16, 8)


def test_more_ranks_than_cores_carry():
    resources.check_cores(8, 2, oversubscribe=False)
    resources.check_cores(64, 2, oversubscribe=True)
    with pytest.raises(ResourceError, match="9 ranks, but 2 cores carry at most 8.*--oversubscribe"):
        resources.check_cores(9, 2, oversubscribe=False)


def test_more_memory_than_there_is():
    resources.check_memory(2**30, 2**30, 1)
    with pytest.raises(ResourceError, match=r"2 ranks need at least 3\.0 GB.*but 1\.0 GB are free"):
        resources.check_memory(3 * 2**30, 2**30, 2)


def test_memory_of_the_state_is_a_lower_bound_by_parameters(demo):
    from llada_megatron.llada_moe.model.parameters import count_parameters

    one = dataclasses.replace(demo, layout=LayoutConfig())
    trainable = count_parameters(demo.model).trainable
    base = resources.needed_bytes(one) - 16 * trainable
    assert 0 < base < 2**30
    bf16 = dataclasses.replace(one, training=dataclasses.replace(one.training, precision="bf16"))
    assert resources.needed_bytes(bf16) == base + 18 * trainable


def test_a_model_of_another_size_class_is_refused_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = load_run("configs/runs/llada-8b-pretrain.yaml")
    with pytest.raises(ResourceError, match="memory for weights, gradients and optimizer state|cores carry at most"):
        resources.check_machine(dataclasses.replace(run, layout=LayoutConfig()))


def test_data_that_is_not_there_is_named_with_the_remedy(demo, tmp_path):
    prefix = tmp_path / "corpus"
    (tmp_path / "corpus.bin").touch()
    sets = [dataclasses.replace(demo.data.sets[0], path=str(prefix))]
    run = dataclasses.replace(demo, data=dataclasses.replace(demo.data, sets=sets))
    with pytest.raises(DataError) as error:
        resources.check_data(run)
    assert f"({prefix}.idx, {prefix}.json missing)" in str(error.value)
    assert f"llada prepare TEXT --output {prefix}" in str(error.value)
    (tmp_path / "corpus.idx").touch()
    (tmp_path / "corpus.json").touch()
    resources.check_data(run)


@pytest.mark.parametrize("name", RUNS.names())
def test_the_remedy_makes_data_for_the_model_of_the_run(name):
    run = load_run(name)
    with pytest.raises(DataError) as error:
        resources.check_data(dataclasses.replace(run, data=DataConfig(sets=[DataSetConfig(path="nowhere")])))
    words = shlex.split(str(error.value).partition("make it with: llada ")[2].partition(" (")[0])
    module = importlib.import_module(cli.COMMANDS[words[0]][0])
    args = cli._parse(cli.command_parser(words[0], module), words[1:])
    prepare._check_arguments(args)
    assert args.train_tokenizer == (run.model.vocab_size < 10_000)  # a published model has a published tokenizer
    assert args.vocab_size == (run.model.vocab_size if args.train_tokenizer else None)


def test_a_vocabulary_that_is_trained_here_has_the_ids_that_the_remedy_knows(tmp_path):
    _, tokenizer = prepared_set(tmp_path)
    assert (tokenizer.mask_id, tokenizer.eos_id) == resources.TRAINED_VOCABULARY


def _with(run, **settings):
    return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, **settings))


def test_the_most_checkpoints_that_lie_there_at_once(demo):
    run = dataclasses.replace(demo, training=dataclasses.replace(demo.training, steps=1050))
    assert resources.checkpoints_at_once(_with(run, interval=100, keep_last=3)) == 4
    assert resources.checkpoints_at_once(_with(run, interval=1000, keep_last=3)) == 2  # 1000 and 1050
    back = dataclasses.replace(run.recovery, not_finite="rollback")
    assert resources.checkpoints_at_once(dataclasses.replace(_with(run, interval=1000), recovery=back)) == 3  # and 0
    # 200, 400 and 600 for ever; 800, 900, 1000 as the last three; 1050
    assert resources.checkpoints_at_once(_with(run, interval=100, keep_last=3, keep_every=200)) == 7


def test_checkpoints_that_will_not_fit_are_refused_with_the_arithmetic(demo, tmp_path, monkeypatch):
    run = dataclasses.replace(_with(demo, keep_last=2, interval=1), output_dir=str(tmp_path / "new" / "run"))
    size = resources.checkpoint_bytes(run)

    def free(checkpoints):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=checkpoints * size))

    free(3)
    resources.check_space(run)
    free(2)
    with pytest.raises(
        ResourceError, match=r"3 will be there at once .checkpoint.keep_last 2,.* 0 of them exist; make"
    ):
        resources.check_space(run)
    (tmp_path / "new/run/checkpoints/step-00000001").mkdir(parents=True)
    resources.check_space(run)
    free(4)  # the copies are on the same file system
    with pytest.raises(ResourceError, match=rf"the checkpoints in {tmp_path}/copy need"):
        resources.check_space(_with(run, copy_to=str(tmp_path / "copy")))
    free(0)
    (tmp_path / f"new/run/checkpoints/step-{run.training.steps:08d}").mkdir()
    resources.check_space(run)  # nothing is left to do


def test_copies_of_another_run_are_not_gone_on_with(demo, tmp_path):
    run = dataclasses.replace(_with(demo, copy_to=str(tmp_path / "copy")), output_dir=str(tmp_path / "mine"))
    for step, owner in ((1, "theirs"), (2, "mine")):
        checkpoint = tmp_path / f"copy/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        manifest.write(checkpoint, manifest.Manifest({"run": {"output_dir": str(tmp_path / owner)}}, {}))
    resources.check_weights(run)  # the newest is its own
    (checkpoint / manifest.FILE_NAME).unlink()
    with pytest.raises(ConfigError, match=r"mine has no checkpoints, .*/copy. are of the run in .*/theirs; set"):
        resources.check_weights(run)
    (tmp_path / "mine/checkpoints/step-00000001").mkdir(parents=True)
    resources.check_weights(run)


def test_a_configuration_written_by_hand_is_not_replaced_by_the_resolved_one(demo, tmp_path):
    path = tmp_path / "config.yaml"
    run = dataclasses.replace(demo, output_dir=str(tmp_path))
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=4000))
    path.write_text(dump_yaml(run))
    resources.check_inputs(str(path), longer)  # what an earlier start wrote may change its values
    path.write_text("# mine\n" + dump_yaml(run))
    resources.check_inputs(str(path), run)
    with pytest.raises(ConfigError, match="over this file, which is its own input; give it another name"):
        resources.check_inputs(str(path), longer)
    assert cli.main(["train", str(path), "training.steps=4000"]) == 2  # before anything is asked of the data
    assert path.read_text().startswith("# mine")
    path.rename(tmp_path / "mine.yaml")
    resources.check_inputs(str(tmp_path / "mine.yaml"), longer)


def test_a_run_does_not_write_into_a_checkpoint(demo, tmp_path):
    for name in ("manifest.json", "metadata.json"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="output_dir: .* lies in the checkpoint"):
        resources.check_inputs("demo", dataclasses.replace(demo, output_dir=str(tmp_path / "run")))
