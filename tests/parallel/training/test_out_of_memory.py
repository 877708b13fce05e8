"""Memory that runs out in a step is told in one line: what was asked for, what takes most, what would save how much."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.parallel.training import out_of_memory
from llada_megatron.parallel.training.out_of_memory import activations, describe, memory_parts, savings
from llada_megatron.parallel.training.step import TrainingStep
from llada_megatron.parallel.training.trainer import Trainer
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, SOFTMAX
from llada_megatron.tools.bench.measurement import single_process
from llada_megatron.tools.bench.our_step import OurStep, masked_batch, run_config, training_batch
from tests.corpora import model_for, prepared_set

FAILURE = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
)


def run_of(model, sequences=4, length=64, **training):
    run = run_config(dataclasses.replace(model, max_sequence_length=length), sequences, length, 1e-3, 1.0)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **training))


def kept_bytes(run):
    """What autograd keeps of a forward pass, each storage once, without the parameters."""
    sizes, step = {}, OurStep(run)
    own = {parameter.untyped_storage().data_ptr() for parameter in step.chunk.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    training = run.training
    batch = training_batch(masked_batch(run.model, training.micro_batch_size, training.sequence_length, 0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.step_on(batch)
    return sum(sizes.values())


@pytest.mark.parametrize("model", [DENSE, SOFTMAX, SIGMOID], ids=["dense", "softmax", "sigmoid"])
def test_the_estimate_is_near_what_autograd_keeps(model):
    run = run_of(dataclasses.replace(model, hidden_size=128, ffn_hidden_size=256, head_dim=32), logits_chunk_mb=1)
    with single_process():
        measured = kept_bytes(run)
    assert 0.6 < activations(run) / measured < 1.6


def test_recomputation_and_micro_batches_lower_the_estimate():
    whole = activations(run_of(SIGMOID, sequences=8))
    assert activations(run_of(SIGMOID, sequences=4)) == pytest.approx(whole / 2)
    assert activations(run_of(SIGMOID, sequences=8, recompute="full")) < whole / 2
    modules = ("layernorm", "mlp", "moe_act", "shared_experts")
    selective = [run_of(SIGMOID, sequences=8, recompute="selective", recompute_modules=[name]) for name in modules]
    assert all(whole / 2 < activations(run) < whole for run in selective)


def test_a_noisy_and_a_clean_copy_are_remembered_as_two_sequences():
    run = run_of(DENSE, sequences=4)
    halves = BlockDiffusionConfig(kind="block_diffusion", block_size=8)
    doubled, whole = (
        dataclasses.replace(run, objective=dataclasses.replace(halves, block_size=size))
        for size in (8, run.training.sequence_length)
    )
    assert activations(whole) == activations(run) and 1.5 < activations(doubled) / activations(run) <= 2


def test_the_settings_that_save_most_come_first():
    large = run_of(load_model("llada-moe-7b-a1b"), 2, 4096, precision="bf16", logits_chunk_mb=1024)
    assert list(savings(large)) == [
        "training.recompute=full",
        "training.micro_batch_size=1 (now 2)",
        "training.logits_chunk_mb=256 (now 1024)",
    ]
    spread = dataclasses.replace(large, layout=dataclasses.replace(large.layout, context_parallel=2))
    assert activations(spread) < activations(large)


def test_each_tensor_is_counted_once_where_it_belongs():
    run = run_of(DENSE, precision="bf16")
    with single_process():
        step = OurStep(run)
        step.step_on(training_batch(masked_batch(run.model, 4, 64, 0)))
        parts = memory_parts(run, step.models, step.optimizer)
    count = sum(parameter.numel() for parameter in step.chunk.parameters())
    assert parts["parameters"] == pytest.approx(2 * count, rel=0.02)
    assert parts["gradients"] == pytest.approx(4 * count, rel=0.02)
    assert parts["optimizer"] == pytest.approx(12 * count, rel=0.02)  # main weights and two moments


class FP8Weight(torch.Tensor):
    """As Transformer Engine 2.20's Float8Tensor: no storage of its own, but FP8 data, and a transposed copy or none."""

    def __new__(cls, data, transposed):
        kind = {"dtype": torch.bfloat16, "device": data.device}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, storage_size=0, **kind)

    def __init__(self, data, transposed):
        self.kept = data, transposed

    def get_data_tensors(self):
        """The data by rows, and by columns."""
        return self.kept

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return arguments[0]  # detach, by which a parameter is made of a tensor


def test_weights_in_fp8_count_what_is_kept_of_them():
    module = torch.nn.Module()
    data, transposed = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(32, 64, dtype=torch.uint8)
    module.both, module.one = (torch.nn.Parameter(FP8Weight(data + 0, kept)) for kept in (transposed, None))
    module.norm = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    assert module.both.untyped_storage().nbytes() == 0
    parts = memory_parts(run_of(DENSE, precision="bf16"), [module], None)
    assert parts["parameters"] == 3 * 64 * 32 + 2 * 32


def test_a_model_that_does_not_fit_is_told_before_it_is_there():
    text = describe(FAILURE, run_of(load_model("llada-8b"), 1, 1024, precision="bf16", logits_chunk_mb=64))
    assert text.startswith("out of memory when 2.50 GiB more were asked for. Computed: gradients 32.1 GB, ")
    assert "parameters 16 GB" in text and "gradients take most" in text
    assert text.endswith(
        "spread the model over more ranks (layout.expert_parallel, tensor_parallel, pipeline_parallel)"
    )


def test_the_card_and_the_peak_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=85e9))
    monkeypatch.setattr(out_of_memory, "peak_memory_gb", lambda _: 83.25)
    assert "on NVIDIA H100 (85 GB); at most 83.2 GB were allocated at a time. " in describe(FAILURE, run_of(DENSE))


def test_a_run_whose_step_runs_out_of_memory_ends_in_that_line(tmp_path, monkeypatch):
    def fails(*_):
        raise FAILURE

    _, tokenizer = prepared_set(tmp_path)
    run = run_of(model_for(tokenizer, "tiny-dense"), sequences=2, length=32)
    data = DataConfig(sets=[DataSetConfig(path=str(tmp_path / "set"))])
    monkeypatch.setattr(TrainingStep, "gradients", fails)
    with single_process():
        trainer = Trainer(dataclasses.replace(run, data=data, output_dir=str(tmp_path / "run")))
        with pytest.raises(ResourceError, match="out of memory when 2.50 GiB more") as told:
            trainer.train(lambda: False)
    assert "\n" not in str(told.value) and "training.recompute=full would save about" in str(told.value)
