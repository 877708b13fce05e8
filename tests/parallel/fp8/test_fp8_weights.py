"""Weights that are kept in FP8 begin with the main weights that others begin with; a checkpoint has plain tensors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.parallel.fp8.recipes import optimizer_fields, reduction_fields
from tests.ranks import run_ranks

KEPT = FP8Config(recipe="tensorwise", param_gather=True)


def fp8_weight_class():
    """A weight as Transformer Engine keeps it: rounded to FP8 whenever it is written, and with no slices to write."""
    import torch

    class FP8Weight(torch.nn.Parameter):
        def dequantize(self):
            return self.as_subclass(torch.Tensor).detach().clone()

        def copy_(self, source):
            rounded = source.to(torch.float8_e4m3fn).to(source.dtype)
            return self.as_subclass(torch.Tensor).copy_(rounded)

        def __getitem__(self, _):
            raise AssertionError("a slice of an FP8 weight")

        chunk = split = __getitem__

        def get_high_precision_init_val(self):
            return self._high_precision_init_val

    return FP8Weight


def keep_in_fp8(chunks, weight_class):
    import torch

    from llada_megatron.llada_moe.model.linear import ColumnLinear, RowLinear

    for module in (module for chunk in chunks for module in chunk.decoder.modules()):
        if isinstance(module, ColumnLinear | RowLinear):
            plain = module.weight
            made = weight_class(torch.zeros_like(plain), requires_grad=True)
            vars(made).update(vars(plain))
            made._high_precision_init_val = torch.zeros_like(plain.detach())
            module._parameters["weight"] = made


def values(chunks):
    return {name: weight.tolist() for chunk in chunks for name, weight in chunk.named_parameters()}


def build_save_and_load(run, folder):
    from pathlib import Path

    import torch
    from megatron.core import fp8_utils
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from llada_megatron.parallel import build, sharded_state, topology
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.fp8 import fp8_weights
    from llada_megatron.parallel.training.state import RunState

    topology.initialize(run.layout, run.training.seed)
    usual = build.build_run_chunks(run)
    weight_class, make = fp8_weight_class(), build.build_chunks
    fp8_utils.is_float8tensor = lambda tensor: isinstance(tensor, weight_class)

    def build_chunks(*arguments):
        chunks = make(*arguments)
        keep_in_fp8(chunks, weight_class)
        return chunks

    build.build_chunks = build_chunks
    chunks = build.build_run_chunks(run)
    kept = {name: p for name, p in chunks[0].named_parameters() if isinstance(p, weight_class)}
    plain = dict(usual[0].named_parameters())
    assert len(kept) == 4 and all(
        torch.equal(weight.get_high_precision_init_val(), plain[name])
        and torch.equal(weight.dequantize(), plain[name].to(torch.float8_e4m3fn).to(plain[name].dtype))
        and not torch.equal(weight.dequantize(), plain[name])
        for name, weight in kept.items()
    )
    store, before = CheckpointStore(Path(folder), 2, False), values(chunks)
    keeping = dataclasses.replace(run, training=dataclasses.replace(run.training, fp8=KEPT))

    def as_saved():
        holder = SimpleNamespace(run=keeping, chunks=chunks)
        return RunState._in_high_precision(holder, sharded_state.model_state(chunks))

    state = as_saved()
    assert not any(isinstance(entry.data, weight_class) for entry in nested_values(state))
    assert {name for name, p in chunks[0].named_parameters() if isinstance(p, weight_class)} == kept.keys()
    store.save(1, state, {"step": 1})
    with torch.no_grad():
        for weight in chunks[0].parameters():
            weight.copy_(torch.ones_like(weight.as_subclass(torch.Tensor)))
    sharded_state.load_model_state(chunks, store.load(store.directory_of(1), as_saved())[0])
    assert values(chunks) == before
    rounded, other = values(chunks), values(usual)
    with fp8_weights.filling(chunks), torch.no_grad():  # as a model is opened in FP8, whatever it held before
        state = sharded_state.model_state(chunks)
        for entry in nested_values(state):
            entry.data.zero_()
        sharded_state.load_model_state(chunks, store.load(store.directory_of(1), state)[0])
    assert values(chunks) == rounded and other != rounded
    # a run that keeps its weights in bf16 reads the same file
    sharded_state.load_model_state(usual, store.load(store.directory_of(1), sharded_state.model_state(usual))[0])
    assert values(usual) == before


def test_fp8_weights_are_initialised_saved_and_loaded_as_plain_tensors(tmp_path):
    run = load_run("demo", ["model=tiny-dense", "model.num_layers=1", "layout={}", "training.sequence_length=64"])
    run_ranks(build_save_and_load, 1, run, str(tmp_path))


def test_only_weights_in_fp8_are_told_to_the_buffers_and_the_optimizer():
    assert reduction_fields(KEPT) == {"fp8_param_gather": True} and optimizer_fields(KEPT) == {
        "fp8_recipe": "tensorwise"
    }
    for other in (None, FP8Config(recipe="tensorwise")):
        assert reduction_fields(other) == {} == optimizer_fields(other)
