"""Passes of fixed shape, recorded once and replayed, against ordinary passes over the same sequences."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.fixed_windows import FixedWindows, PassShape
from llada_megatron.llada_moe.model.windows import KeyValues
from llada_megatron.llada_moe.sampling import pass_shapes
from llada_megatron.llada_moe.sampling.caches import (
    BlockCausalCache,
    DualCache,
    NoCache,
    PrefixCache,
    Recompute,
)
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation, Threshold
from llada_megatron.llada_moe.sampling.speculation import group_of
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel import device, topology
from llada_megatron.parallel.sampling import cuda_graphs
from llada_megatron.parallel.sampling.cuda_graphs import CudaRecorder, obstacle_to, recorder_of
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.parallel.sampling.stage import StageRunner
from llada_megatron.tools.bench.sampling.graph_figures import Rerunner
from tests.host_waits import HostWaits
from tests.parallel.sampling.recorded_operations import OperationRecorder
from tests.parallel.sampling.spread import GRID, MASK, MODELS, load, requests
from tests.parallel.sampling.test_pass_host_waits import STATISTICS

SEQ, BLOCKS = 64, 16
BIDIRECTIONAL = [NoCache(), PrefixCache(), DualCache(before=3, behind=2)]
CASES = [
    *((model, cache, None) for model in ("dense", "experts") for cache in BIDIRECTIONAL),
    *((model, cache, GRID) for model in ("dense", "experts") for cache in (BlockCausalCache(), Recompute())),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


@pytest.fixture(scope="module")
def models():
    return {(name, grid): load(MODELS[name], LayoutConfig(), grid) for name, _, grid in CASES}


@pytest.fixture
def at_once(monkeypatch):
    """Capture a shape with its first pass, and pad whatever is needed."""
    monkeypatch.setattr(cuda_graphs, "ORDINARY_USES", 0)
    monkeypatch.setattr(pass_shapes, "FREE_PER_WEIGHT", pass_shapes.MOST_POSITIONS)


@pytest.fixture
def grouped_products(monkeypatch):
    """The experts of a GPU: grouped products, whose groups the host does not know."""
    monkeypatch.setattr(grouped, "_in_one_call", lambda *_: True)
    with grouped.everywhere():
        yield


def method_of(cache, grid=None, guidance=0.0, needs=(), excluded=(MASK,)) -> Method:
    processor = LogitsProcessor(needs=frozenset(needs), excluded=excluded, guidance=guidance)
    return Method(Threshold(0.5), cache, logits_processor=processor, grid=grid)


def compared(loaded, method, waiting, batch_size):
    """Run every pass both ways; returns the largest difference of logits, and what was replayed."""
    group = group_of(method, batch_size, SEQ, BLOCKS, MASK)
    runners = [StageRunner(loaded.model, method, batch_size, SEQ, each) for each in (None, OperationRecorder())]
    apart, waiting = [0.0], list(waiting)
    while True:
        for slot, request in zip(group.free, list(waiting), strict=False):
            group.admit(slot, request)
            waiting.remove(request)
        if (work := group.plan()) is None:
            return max(apart), runners[1].graphs.counts
        outputs = [runner.forward(work) for runner in runners]
        if outputs[0].numel():
            apart.append(float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()))
        one, other = (runner.read(work, output) for runner, output in zip(runners, outputs, strict=True))
        assert torch.equal(one.token, other.token)
        if one.divergence is not None:
            torch.testing.assert_close(one.divergence, other.divergence, atol=1e-4, rtol=1e-4)
        group.apply(other)


@pytest.mark.usefixtures("grouped_products", "at_once")
@pytest.mark.parametrize(("model", "cache", "grid"), CASES, ids=str)
@settings(max_examples=2)
@given(seed=st.integers(0, 999), count=st.integers(2, 6), batch_size=st.integers(1, 4))
def test_a_replayed_pass_gives_the_logits_of_an_ordinary_one(models, model, cache, grid, seed, count, batch_size):
    apart, counts = compared(models[model, grid], method_of(cache, grid), requests(count, grid, seed), batch_size)
    assert apart <= 1e-5
    assert not counts.ordinary
    assert counts.replayed > counts.captured


@pytest.mark.usefixtures("at_once")
def test_drafts_and_their_verification_are_replayed():
    method = dataclasses.replace(method_of(BlockCausalCache()), schedule=SelfSpeculation(draft_length=6))
    texts = [continuation(range(5, 8 + 4 * stream), 12, None, stream) for stream in range(3)]
    apart, counts = compared(load(MODELS["dense"], LayoutConfig(), None, causal=True), method, texts, 2)
    assert apart <= 1e-5
    assert counts.replayed > 0 and not counts.ordinary


@pytest.mark.usefixtures("at_once")
def test_rows_without_the_given_text_are_replayed_too(models):
    method = method_of(DualCache(), guidance=0.7)
    apart, counts = compared(models["dense", None], method, requests(5, None), 3)
    assert apart <= 1e-5
    assert counts.replayed > 0 and not counts.ordinary


@pytest.mark.usefixtures("at_once")
def test_logits_that_the_next_step_compares_with_are_not_overwritten(models):
    method = method_of(DualCache(), needs=["divergence"], excluded=())
    assert compared(models["dense", None], method, requests(3, None), 2)[0] <= 1e-5


def test_texts_are_those_of_ordinary_passes_and_a_shape_is_captured_after_its_second_use(models):
    loaded, method = models["dense", None], method_of(PrefixCache())
    texts = requests(6, None, seed=3)
    results, reports = [], []
    for recorder in (None, OperationRecorder()):
        generator = SequenceGenerator(loaded, method, 2, recorder=recorder)
        results.append({one.stream: one for step in generator.steps(texts) for one in step.finished})
        reports.append(generator.report)
    assert results[0] == results[1]
    without, counts = (report.graphs for report in reports)
    assert (without.replayed, without.captured) == (0, 0)
    assert counts.captured == len(recorder.recorded) and counts.replayed == sum(r.replays for r in recorder.recorded)
    assert counts.replayed + counts.ordinary.total() == reports[1].passes
    assert counts.ordinary["the first passes of a shape"] >= 2 * counts.captured > 0
    assert f"{counts.replayed} of {reports[1].passes} passes replayed {counts.captured} CUDA graph" in str(counts)


@pytest.mark.usefixtures("at_once")
def test_a_later_call_replays_what_an_earlier_one_captured_unless_the_weights_have_moved(models, monkeypatch):
    loaded, recorder = models["dense", None], OperationRecorder()
    weight = loaded.model.output_layer.weight

    def call(seed):
        texts, method = requests(2, None, seed), method_of(PrefixCache())
        generators = [SequenceGenerator(loaded, method, 2, recorder=each) for each in (recorder, None)]
        one, other = ({e.stream: e for step in g.steps(texts) for e in step.finished} for g in generators)
        assert one == other
        return generators[0].report.graphs

    call(seed=3)
    before = len(recorder.recorded)
    assert call(seed=3).captured == 0 and len(recorder.recorded) == before > 0
    monkeypatch.setattr(weight, "data", weight.data.clone())
    assert call(seed=3).captured == before
    with torch.no_grad():
        weight.mul_(1.5)
    assert call(seed=3).replayed > 0  # with the present values of the weights
    monkeypatch.setattr(cuda_graphs, "MOST_BYTES_LEFT", 0)
    call(seed=3)
    assert recorder.left is None


@pytest.mark.usefixtures("at_once")
def test_few_graphs_are_kept(models, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    runner = StageRunner(models["dense", None].model, method_of(NoCache()), 1, SEQ, OperationRecorder())
    group = group_of(method_of(NoCache()), 1, SEQ, BLOCKS, MASK)
    works = []
    for length in (4, 50):
        group.admit(0, continuation(range(1, length), 4, None))
        works.append(group.plan())
        group = group_of(method_of(NoCache()), 1, SEQ, BLOCKS, MASK)
    first, second, again = (runner.forward(works[i]) for i in (0, 1, 0))
    assert runner.graphs.counts.captured == 3
    assert torch.equal(first, again) and len(second) == len(first)


@pytest.mark.usefixtures("at_once")
def test_a_capture_that_fails_leaves_ordinary_passes_and_the_reason(models):
    class Refusing:
        nbytes, left = 0, None

        def record(self, run):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    loaded, method = models["dense", None], method_of(DualCache())
    generator = SequenceGenerator(loaded, method, 1, recorder=Refusing())
    assert [one.stream for step in generator.steps(requests(1, None)) for one in step.finished] == [0]
    counts = generator.report.graphs
    assert counts.ordinary.total() == generator.report.passes and not counts.replayed
    reason = "the capture failed (CUDA error: operation not permitted when stream is capturing)"
    assert set(counts.ordinary) == {reason}


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_the_host_waits_for_nothing_in_a_pass(name):
    """`FakeTensorMode` refuses every value that the host would have to read."""
    model = load(MODELS[name], LayoutConfig(), GRID).model.bfloat16()
    shape = PassShape(windows=2, width=GRID, keys=32, rows=4, in_order=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), grouped.everywhere():
        held = [*model.named_parameters(), *model.named_buffers()]
        state = {name: fake.from_tensor(value) for name, value in held}
        windows = FixedWindows(shape, KeyValues(3, SEQ), SEQ, GRID, torch.device("cpu"))
        arguments = (windows.tokens[None], windows), {"rows": windows.rows}
        logits = torch.func.functional_call(model, state, *arguments)
    assert logits.shape == (4, model.vocab_size)


@pytest.mark.usefixtures("at_once", "grouped_products")
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_around_a_replayed_pass_the_host_waits_for_the_statistics_and_for_nothing_else(models, name):
    loaded = models[name, GRID]
    generator = SequenceGenerator(loaded, method_of(BlockCausalCache(), GRID), 2, recorder=Rerunner())
    with HostWaits([loaded.model]) as waits:
        for _ in generator.steps(requests(2, GRID)):
            pass
    assert generator.report.graphs.replayed == generator.report.passes
    assert waits.waits == {STATISTICS: generator.report.passes}, str(waits)


def test_without_a_gpu_there_are_no_graphs_and_asking_for_them_is_refused(models):
    model = models["dense", None].model
    assert recorder_of("auto", model) is None and recorder_of("never", model) is None
    with pytest.raises(ConfigError, match="^cuda_graphs always: this machine has no GPU; with auto, passes"):
        recorder_of("always", model)


def test_on_a_gpu_the_reason_is_named_where_passes_cannot_be_captured(models, monkeypatch):
    by_blocks = load(MODELS["routed by blocks"], LayoutConfig(), GRID).model
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    assert obstacle_to("always", models["dense", None].model) is None
    experts = models["experts", None].model
    assert "the host must know how many tokens each has" in obstacle_to("auto", experts)
    with grouped.everywhere():
        assert obstacle_to("auto", experts) is None
        with pytest.raises(ConfigError, match="cuda_graphs always: its experts are chosen block by block"):
            obstacle_to("always", by_blocks)
    monkeypatch.setattr(cuda_graphs.parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    assert obstacle_to("auto", models["dense", None].model) == "the model is spread over 2 tensor-parallel ranks"


def test_a_pass_is_run_once_on_a_side_stream_and_then_captured_into_the_shared_pool(monkeypatch):
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    real = inspect.signature(torch.cuda.graph.__init__)

    @contextmanager
    def graph(*args, **kwargs):
        calls.append(("capture", real.bind(None, *args, **kwargs).arguments["pool"]))
        yield

    replaying = SimpleNamespace(replay=lambda: calls.append("replay"))
    made = {"CUDAGraph": lambda: replaying, "graph_pool_handle": lambda: (0, 1)}
    streams = {"Stream": Stream, "current_stream": Stream, "stream": lambda _: nullcontext()}
    reserved = {"memory_reserved": iter([3, 10, 20, 21]).__next__}
    for name, value in {**made, **streams, **reserved, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder()
    for _ in range(2):
        recorder.record(lambda: calls.append("run")).replay()
    assert calls == ["wait", "run", "wait", ("capture", (0, 1)), "run", "replay"] * 2
    assert recorder.nbytes == 8
