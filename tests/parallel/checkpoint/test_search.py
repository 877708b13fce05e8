"""Which checkpoint `checkpoint.load` means, and which models may start from one."""

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_model, to_dict
from llada_megatron.llada_moe.config.data import DataConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.search import require_model, weights_to_start_from

MODEL = load_model("tiny-moe-softmax")


def _run(load):
    return RunConfig(
        model=MODEL,
        training=TrainingConfig(steps=1, sequence_length=8, global_batch_size=1),
        data=DataConfig(sets=[]),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=0.0)),
        output_dir="",
        checkpoint=CheckpointConfig(load=str(load) if load else None),
    )


def _checkpoint(root, step, model):
    directory = root / "checkpoints" / manifests.step_name(step)
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(b"12345")
    files = {"weights": manifests.record(directory / "weights")}
    manifests.write(directory, manifests.Manifest({"model": to_dict(model)}, files))
    return directory


def test_a_run_means_its_newest_whole_checkpoint(tmp_path):
    older, newer = _checkpoint(tmp_path, 1, MODEL), _checkpoint(tmp_path, 2, MODEL)
    assert weights_to_start_from(_run(tmp_path)) == newer
    assert weights_to_start_from(_run(older)) == older
    (newer / "weights").write_bytes(b"123")
    assert weights_to_start_from(_run(tmp_path)) == older
    with pytest.raises(CheckpointError, match="weights has 3 bytes instead of 5"):
        weights_to_start_from(_run(newer))


@pytest.mark.parametrize(
    "model", [{}, {"num_layers": 2}, to_dict(MODEL) | {"num_layers": "x"}, to_dict(MODEL) | {"moe": [[1]]}, None]
)
def test_a_manifest_that_describes_no_model_is_passed_over(tmp_path, model):
    older, newer = _checkpoint(tmp_path, 1, MODEL), _checkpoint(tmp_path, 2, MODEL)
    facts = {} if model is None else {"model": model}
    manifests.write(newer, replace(manifests.read(newer), metadata=facts))
    assert weights_to_start_from(_run(tmp_path)) == older
    with pytest.raises(manifests.DamagedCheckpointError, match="its manifest does not describe a model"):
        weights_to_start_from(_run(newer))


def test_nothing_to_start_from(tmp_path):
    assert weights_to_start_from(_run(None)) is None
    with pytest.raises(CheckpointError, match="no checkpoint in .*nowhere: give a run's output directory"):
        weights_to_start_from(_run(tmp_path / "nowhere"))


def test_weights_of_another_architecture_are_refused(tmp_path):
    _checkpoint(tmp_path, 1, replace(MODEL, num_layers=2))
    with pytest.raises(CheckpointError, match="num_layers: 2 in the checkpoint, 4 in this run"):
        weights_to_start_from(_run(tmp_path))


def test_keys_of_training_may_differ_where_only_the_weights_are_taken(tmp_path):
    metadata = {"model": to_dict(replace(MODEL, init_std=0.5, moe=replace(MODEL.moe, aux_loss_coefficient=0.0)))}
    require_model(tmp_path, metadata, MODEL, weights_only=True)
    with pytest.raises(CheckpointError, match=r"aux_loss_coefficient: 0.0 in the checkpoint, 0.01 in this run"):
        require_model(tmp_path, metadata, MODEL)


def test_a_key_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path):
    metadata = {"model": to_dict(MODEL)}
    del metadata["model"]["moe"]["routed_scaling_factor"]
    require_model(tmp_path, metadata, MODEL)
    with pytest.raises(CheckpointError, match=r"routed_scaling_factor: 1.0 in the checkpoint, 2.0 in this run"):
        require_model(tmp_path, metadata, replace(MODEL, moe=replace(MODEL.moe, routed_scaling_factor=2.0)))
