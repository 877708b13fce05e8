"""What delayed scaling remembers is saved as plain tensors, and read under any layout."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from tests.corpora import model_for, prepared_set
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
HISTORY, EXPERTS, LAYERS = 4, 4, 2
EP2 = LayoutConfig(data_parallel=2, expert_parallel=2)
TP2 = LayoutConfig(tensor_parallel=2, sequence_parallel=True)
PP2 = LayoutConfig(pipeline_parallel=2)
CP2 = LayoutConfig(context_parallel=2)
DELAYED = FP8Config(recipe="delayed", amax_history_length=HISTORY)


def use_fake_engine(recipe=None):
    from megatron.core import fp8_utils

    fp8_utils.get_fp8_recipe = lambda config: recipe
    fp8_utils.get_fp8_context = lambda *_, **__: contextlib.nullcontext()


def facts(chunks):
    """Scales and histories by layer of the model, the experts' by operand and global expert; equal layouts hold equal
    ones."""
    from megatron.core import parallel_state

    found = {}
    for number, layer in layers_of(chunks):
        experts = layer.linear_fc1.num_gemms
        first = parallel_state.get_expert_model_parallel_rank() * experts
        for key, operands in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            dense, grouped = layer.linear_qkv.fp8_meta[key], layer.linear_fc1.fp8_meta[key]
            found[number, key] = (dense.scale.tolist(), dense.amax_history.tolist())
            for expert in range(experts):
                own = slice(expert * operands, (expert + 1) * operands)  # as GroupedLinear counts its quantizers
                maxima = grouped.amax_history[:, own].tolist()
                found[number, key, first + expert] = (grouped.scale[own].tolist(), maxima)
    return found


def layers_of(chunks):
    return [(layer.layer_number - 1, layer) for chunk in chunks for layer in chunk.decoder.layers]


def fill(chunks):
    """Values that tell the layer, the operand, the row and the global expert."""
    import torch
    from megatron.core import parallel_state

    for layer_number, layer in layers_of(chunks):
        first = parallel_state.get_expert_model_parallel_rank() * layer.linear_fc1.num_gemms
        for number, (key, operands) in enumerate((("scaling_fwd", 3), ("scaling_bwd", 2))):
            for module, offset in ((layer.linear_qkv, 0), (layer.linear_fc1, 1000 * (1 + first))):
                state = module.fp8_meta[key]
                columns = torch.arange(state.scale.numel())
                values = 100.0 * number + columns % operands + 1000 * (columns // operands) + offset
                values += 10_000 * layer_number
                state.scale.copy_(values)
                state.amax_history.copy_(values + 10 * (1 + torch.arange(state.amax_history.size(0)))[:, None])


def chunks_of_stage(layout, history):
    """A chunk for each layer of this pipeline stage."""
    from megatron.core import parallel_state

    from tests.parallel.fp8.fp8_modules import chunk_of

    each = LAYERS // layout.pipeline_parallel
    first = each * parallel_state.get_pipeline_model_parallel_rank()
    return [chunk_of(history, EXPERTS // layout.expert_parallel, layer) for layer in range(first, first + each)]


def save_or_load(layout, folder, saving, history=HISTORY):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.fp8 import fp8_state

    topology.initialize(layout, 0)
    use_fake_engine()
    chunks = chunks_of_stage(layout, history)
    fp8_state.prepare(chunks)
    store = CheckpointStore(Path(folder), 2, False)
    if saving:
        fill(chunks)
        store.save(1, {"fp8": fp8_state.scaling_state(chunks)}, {"step": 1})
    else:
        before = [id(tensor) for tensor in fp8_state.scaling_tensors(chunks)]
        template = fp8_state.scaling_state(chunks, HISTORY)
        state, _ = store.load(store.directory_of(1), {"fp8": template})
        fp8_state.load_scaling_state(chunks, state["fp8"])
        assert [id(tensor) for tensor in fp8_state.scaling_tensors(chunks)] == before  # the engine holds on to them
    return facts(chunks)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    return folder, run_ranks(save_or_load, 2, EP2, str(folder), True)


def stage_of(whole, stage):
    return {key: value for key, value in whole.items() if key[0] == stage}


def test_every_layout_reads_what_another_saved(saved):
    folder, (first, second) = saved
    whole = first | second
    assert len(whole) == LAYERS * (2 + 2 * EXPERTS) and first[0, "scaling_fwd"] == second[0, "scaling_fwd"]
    assert whole[0, "scaling_bwd", 3][0] == [4100.0, 4101.0] and whole[1, "scaling_bwd", 3][0] == [14100.0, 14101.0]
    assert run_ranks(save_or_load, 1, LayoutConfig(), str(folder), False) == [whole]
    for layout in (TP2, CP2):
        assert run_ranks(save_or_load, 2, layout, str(folder), False) == [whole, whole]
    assert run_ranks(save_or_load, 2, PP2, str(folder), False) == [stage_of(whole, 0), stage_of(whole, 1)]
    assert run_ranks(save_or_load, 2, EP2, str(folder), False) == [first, second]


@pytest.mark.parametrize("layout", [PP2, CP2], ids=["PP2", "CP2"])
def test_what_stages_and_context_ranks_saved_is_read_by_one_process(saved, tmp_path, layout):
    whole = saved[1][0] | saved[1][1]
    run_ranks(save_or_load, 2, layout, str(tmp_path), True)
    assert run_ranks(save_or_load, 1, LayoutConfig(), str(tmp_path), False) == [whole]


@pytest.mark.parametrize(("length", "rows"), [(1, [0]), (2, [0, 3]), (6, [0, None, None, 1, 2, 3])])
def test_another_history_keeps_the_newest_maxima(saved, length, rows):
    folder, (first, _) = saved
    (loaded,) = run_ranks(save_or_load, 1, LayoutConfig(), str(folder), False, length)
    maxima = first[0, "scaling_fwd"][1]
    assert loaded[0, "scaling_fwd"][1] == [[0.0] * 3 if row is None else maxima[row] for row in rows]
    assert loaded[0, "scaling_fwd"][0] == first[0, "scaling_fwd"][0]


def stateless():
    from llada_megatron.parallel.fp8 import fp8_state
    from tests.parallel.fp8.fp8_modules import chunk_of

    chunk = chunk_of(HISTORY, EXPERTS, recipe="blockwise")
    fp8_state.prepare([chunk])
    linear = chunk.decoder.layers[0].linear_qkv
    linear.fp8 = linear.fp8_meta["fp8_checkpoint"] = True
    with fp8_state.without_pickles(chunk):
        chunk.state_dict()
    return fp8_state.scaling_state([chunk]), linear.fp8, linear.fp8_meta["fp8_checkpoint"]


def test_other_recipes_keep_nothing_and_no_pickle_is_made():
    assert run_ranks(stateless, 1) == [({}, True, True)]


def test_transformer_engine_lays_its_state_out_as_it_is_read():
    """With the real package, where it is installed; it needs no GPU."""
    try:
        importlib.metadata.version("transformer-engine-torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Transformer Engine is not installed")
    program = [sys.executable, "-m", "tests.parallel.fp8.fp8_engine"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "NVTE_FRAMEWORK": "pytorch"}
    subprocess.run(program, check=True, cwd=ROOT, env=environment)


def engine_in_the_layers():
    """Make the linear layers of the runs built from here on behave as with delayed scaling: a pass depends on the
    passes before it, and validation leaves its maxima behind."""
    import torch

    from llada_megatron.llada_moe.model.linear import ColumnLinear, RowLinear
    from llada_megatron.parallel import build
    from llada_megatron.parallel.training import reporter
    from tests.parallel.fp8.fp8_modules import add_fp8

    def scaled(module, inputs, outputs):
        state = module.fp8_meta.get("scaling_fwd")
        if state is None:  # the run is not in FP8
            return outputs
        result = outputs[0] * (1 + 0.1 * torch.tanh(state.scale[0]))
        with torch.no_grad():
            state.amax_history[0, 0] = torch.maximum(state.amax_history[0, 0], inputs[0].abs().max())
            if torch.is_grad_enabled() or module.training:
                state.scale[0] = state.amax_history[:, 0].max()
                state.amax_history.copy_(state.amax_history.roll(-1, 0))
                state.amax_history[0] = 0
        return (result, *outputs[1:])

    make = build.build_chunks

    def build_chunks(*arguments):
        chunks = make(*arguments)
        for module in (module for chunk in chunks for module in chunk.decoder.modules()):
            if isinstance(module, ColumnLinear | RowLinear):
                add_fp8(module, HISTORY)
                module.register_forward_hook(scaled)
        return chunks

    use_fake_engine()
    build.build_chunks = build_chunks
    reporter.matmul_peak = lambda *_: 1e12  # half a second a run, for nothing


def train(run, last, bad_step=None):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.fp8 import fp8_state
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.parallel.training.trainer import Trainer

    engine_in_the_layers()
    topology.initialize(run.layout, run.training.seed)
    norm, asked = TrainingStep.norm, []

    def spoilt(self):
        asked.append(1)
        return float("nan") if len(asked) == bad_step else norm(self)

    TrainingStep.norm = spoilt
    trainer = Trainer(run)
    trainer.train(lambda: trainer.state.step == last - 1)
    return [tensor.tolist() for tensor in fp8_state.scaling_tensors(trainer.models)], trainer.state.remarks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8-run")
    _, tokenizer = prepared_set(root)
    model = dataclasses.replace(model_for(tokenizer), moe=None, family="llada", num_layers=1)
    return RunConfig(
        model=model,
        training=TrainingConfig(steps=4, sequence_length=32, global_batch_size=2, precision="fp32", fp8=DELAYED),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        checkpoint=CheckpointConfig(interval=2, keep_last=9),
        logging=LoggingConfig(interval=1, tensorboard=False),
        output_dir=str(root / "whole"),
    )


def losses(run):
    lines = [json.loads(line) for line in Path(run.output_dir, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(run):
    ((state, remarks),) = run_ranks(train, 1, run, 4)
    assert remarks == [] and state[0][0] != 1 and any(map(any, state[1]))
    return state


def test_a_resumed_run_goes_on_with_its_scales_as_if_it_had_not_been_stopped(run, whole):
    stopped = dataclasses.replace(run, output_dir=run.output_dir + "-stopped")
    run_ranks(train, 1, stopped, 2)
    assert run_ranks(train, 1, stopped, 4) == [(whole, [])]
    assert losses(stopped) == losses(run)


def test_a_step_run_again_and_a_validation_leave_the_scales_as_they_were(run, whole):
    again = dataclasses.replace(
        run, output_dir=run.output_dir + "-again", validation=ValidationConfig(interval=1, sequences=2)
    )
    assert run_ranks(train, 1, again, 4, 3) == [(whole, [])]
    assert losses(again) == losses(run)


def test_a_checkpoint_without_fp8_says_that_the_scales_begin_anew(run, whole):
    plain = dataclasses.replace(
        run, training=run.training.without_fp8(), output_dir=str(Path(run.output_dir).parent / "plain")
    )
    run_ranks(train, 1, plain, 2)
    on = dataclasses.replace(plain, training=run.training)
    ((state, remarks),) = run_ranks(train, 1, on, 4)
    assert len(remarks) == 1 and remarks[0].endswith(
        "was trained in bf16 and has no scales of FP8 recipe delayed: they begin anew"
    )
    assert state != whole and state[0][0] != 1
    shutil.rmtree(plain.output_dir)
