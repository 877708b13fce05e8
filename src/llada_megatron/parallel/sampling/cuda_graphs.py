"""CUDA graphs of passes: a pass that was captured once serves all later passes of its shape.

A pass of a few positions starts some thousand kernels, each of which takes the host longer to start than the GPU to
run. A graph holds them all; replaying it is one call. What a graph reads and writes has fixed addresses: the input
buffer of its `FixedWindows`, the kept keys and values, the weights, and its logits, which are copied before the next
replay.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.experts import expert_weights
from llada_megatron.llada_moe.model.fixed_windows import FixedWindows, PassShape
from llada_megatron.llada_moe.model.layer import DirectExperts
from llada_megatron.llada_moe.model.routing import BlockRouter
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.model.windows import KeyValues
from llada_megatron.llada_moe.sampling.pass_shapes import KEYS_STEP, contents, shape_of
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.parallel import device
from llada_megatron.parallel.sampling.settings import GraphUse

MOST_GRAPHS = 24
"""Graphs that are kept at a time; the one that was not replayed for longest makes room."""
MOST_BYTES_LEFT = 2 << 30
"""Keys and values that stay reserved between two calls, with the graphs that write to them."""
ORDINARY_USES = 2
"""Passes of a shape that run without a graph before it is captured: many shapes occur once."""


class Recorded(Protocol):
    """A captured pass."""

    output: torch.Tensor
    """What the pass returns, overwritten by each replay."""

    def replay(self) -> None:
        """Run the pass on what its buffers hold now."""
        ...


class Recorder(Protocol):
    """Captures passes."""

    nbytes: int
    """Device memory that the captured passes have reserved, the kept keys and values not included."""
    left: GraphedPasses | None
    """What an earlier group of sequences has left for the next one; see `GraphedPasses.taken`."""

    def record(self, run: Callable[[], torch.Tensor]) -> Recorded:
        """Run the pass once, so that everything that lives longer than a pass exists, and capture it."""
        ...


@dataclass
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Captures passes as CUDA graphs that share one memory pool, since only one of them runs at a time."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.left: GraphedPasses | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()  # one for all: what a stream has freed serves no other

    def record(self, run: Callable[[], torch.Tensor]) -> _CudaGraph:
        """Implements `Recorder.record`."""
        side, main = self._side, torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run()  # libraries choose kernels and allocate workspaces when they first see a shape
        main.wait_stream(side)
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self.nbytes += max(0, torch.cuda.memory_reserved() - before)
        return _CudaGraph(graph, output)


@dataclass
class GraphCounts:
    """How many passes were replayed, and why others were not."""

    replayed: int = 0
    captured: int = 0
    nbytes: int = 0
    """Device memory that the graphs have reserved."""
    ordinary: Counter[str] = field(default_factory=Counter)
    """Passes that ran without a graph, by reason."""

    def __add__(self, other: GraphCounts) -> GraphCounts:
        """The counts of both, whose graphs share their memory."""
        return GraphCounts(
            self.replayed + other.replayed,
            self.captured + other.captured,
            max(self.nbytes, other.nbytes),
            self.ordinary + other.ordinary,
        )

    def __str__(self) -> str:
        """One line for the user."""
        others = "".join(f"; {count} without: {reason}" for reason, count in self.ordinary.most_common())
        graphs = f"{self.captured} CUDA graph{'s' * (self.captured != 1)} ({self.nbytes / 2**20:.0f} MiB)"
        return f"{self.replayed} of {self.replayed + self.ordinary.total()} passes replayed {graphs}{others}"


def recorder_of(use: GraphUse, model: DiffusionTransformer) -> Recorder | None:
    """What captures the passes of a model; None = its passes run without graphs.

    Raises:
        ConfigError: graphs are asked for, and the model cannot have them here.
    """
    return CudaRecorder() if use != "never" and obstacle_to(use, model) is None else None


def obstacle_to(use: GraphUse, model: DiffusionTransformer) -> str | None:
    """Why no pass of this model can be captured; None = passes can be.

    Raises:
        ConfigError: `use` is "always", and there is a reason.
    """
    reason = _obstacle(model)
    if reason is not None and use == "always":
        raise ConfigError(f"cuda_graphs always: {reason}; with auto, passes run without graphs")
    return reason


def _obstacle(model: DiffusionTransformer) -> str | None:
    if not device.cuda_available():
        return "this machine has no GPU"
    spread = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_tensor_and_model_parallel_group().size(),
    }
    for axis, ranks in spread.items():
        if ranks > 1:
            return f"the model is spread over {ranks} {axis}-parallel ranks"
    if model.config.fp8:
        return "it computes in FP8"
    return next((reason for layer in model.decoder.layers if (reason := _obstacle_of(layer.mlp))), None)


def _obstacle_of(mlp: torch.nn.Module) -> str | None:
    """Why a layer's feed-forward part cannot be captured."""
    if not isinstance(mlp, MoELayer):
        return None
    if isinstance(mlp.router, BlockRouter):
        return "its experts are chosen block by block"
    first, _ = expert_weights(mlp.experts)
    if not isinstance(mlp, DirectExperts) or not grouped.usable(first[0], first):
        return "its experts run one after the other, and the host must know how many tokens each has"
    return None


class GraphedPasses:
    """The captured passes of one group of sequences, whose kept keys and values they write to."""

    def __init__(
        self, model: DiffusionTransformer, memory: KeyValues | None, capacity: int, recorder: Recorder
    ) -> None:
        """`capacity`: no position reaches it."""
        self.counts = GraphCounts()
        self.memory = memory
        self._model, self._capacity, self._recorder = model, capacity, recorder
        self._fixed = _fixed(model)
        experts = model.config.num_moe_experts
        self._weights_per_use = experts / model.config.moe_router_topk if experts else 1.0
        self._graphs: OrderedDict[PassShape, tuple[FixedWindows, Recorded]] = OrderedDict()
        self._seen: Counter[PassShape] = Counter()
        self._failure: str | None = None

    @classmethod
    def taken(cls, recorder: Recorder, model: DiffusionTransformer, slots: int, seq: int) -> GraphedPasses:
        """Those that an earlier group has left, where they serve the next one too, or new ones.

        Args:
            recorder: captures passes.
            model: the model; its weights may have changed since, but not their place in memory.
            slots: rows of kept keys and values; 0 = none are kept.
            seq: no position reaches it.
        """
        left, recorder.left = recorder.left, None
        if left is not None and left._model is model and left._serve(slots, seq):
            left.counts = GraphCounts(nbytes=recorder.nbytes)
            return left
        capacity = -(-seq // KEYS_STEP) * KEYS_STEP
        return cls(model, KeyValues(slots, capacity) if slots else None, capacity, recorder)

    def leave(self) -> None:
        """Let the next group have them, unless that would keep much memory from everything else meanwhile."""
        if self.memory is None or self.memory.nbytes <= MOST_BYTES_LEFT:
            self._recorder.left = self

    def _serve(self, slots: int, seq: int) -> bool:
        own = 0 if self.memory is None else self.memory.slots
        fits = own == slots and seq <= self._capacity <= 2 * seq + KEYS_STEP
        return fits and self._fixed == _fixed(self._model)

    @torch.inference_mode()
    def run(self, work: Pass) -> torch.Tensor | None:
        """The logits of a pass, float32 `[rows, vocab]`; None = it has no graph, and must be run without."""
        shape = self._failure or shape_of(work, self.memory, self._weights_per_use)
        if isinstance(shape, str):
            return self._without(shape)
        if shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] <= ORDINARY_USES:
                return self._without("the first passes of a shape")
        own = contents(work, shape, self._model.pattern.block)
        if shape not in self._graphs and not self._capture(shape, own):
            return self._without(self._failure or "")
        self._graphs.move_to_end(shape)
        windows, recorded = self._graphs[shape]
        windows.fill(own)
        recorded.replay()
        self.counts.replayed += 1
        rows = int(work.output_mask.sum())
        return recorded.output[:rows].to(torch.float32, copy=True)

    def _capture(self, shape: PassShape, own: torch.Tensor) -> bool:
        """Capture a shape on the contents of its first pass. Returns False if the GPU or a library refuses."""
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        block, where = self._model.pattern.block, device.current()
        windows = FixedWindows(shape, self.memory, self._capacity, block, where)
        windows.fill(own)
        try:
            recorded = self._recorder.record(lambda: self._pass(windows))
        except RuntimeError as error:  # also out of memory; what was captured before is given back
            self._graphs.clear()
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._failure = f"the capture failed ({first})"
            return False
        self._graphs[shape] = windows, recorded
        self.counts.captured += 1
        self.counts.nbytes = self._recorder.nbytes
        return True

    def _pass(self, windows: FixedWindows) -> torch.Tensor:
        logits = self._model(windows.tokens[None], windows, rows=windows.rows)
        windows.renew()
        return logits

    def _without(self, reason: str) -> None:
        self.counts.ordinary[reason] += 1


def _fixed(model: DiffusionTransformer) -> list[int | None]:
    """What a captured pass knows of the model: where its weights are, and the block size of its attention."""
    return [model.pattern.block, *(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))]
