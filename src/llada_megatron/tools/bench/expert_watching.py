"""`llada bench experts`: what watching the experts takes of a training step.

One process trains a MoE model in fp32. Every watcher's own time is taken where it is called, so that the figure does
not drown in what else the machine does: the hooks in the passes of each step, and the reading with its lines, scalars
and image at the end of an interval (`logging.interval`, 10 by default). On a GPU the hooks' time is that of giving the
work to the device; there, and as a second opinion here, steps with and without watchers alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_most, reported

GOAL = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to measure."""
    parser.add_argument("--intervals", type=int, default=3, help="intervals after one to warm up (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of an interval (default %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="of a step, in one micro-batch (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, as a rank has)")


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures, and returns the claims."""
    import torch

    from llada_megatron.tools.bench.measurement import single_process

    torch.set_num_threads(args.threads)
    with single_process(), tempfile.TemporaryDirectory() as folder:
        return _measure(args, Path(folder))


class Stopwatch:
    """Sums the time of the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is counted."""

        def call(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return call

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def wrap_hooks(models: list[Any], known: set[int], watch: Stopwatch) -> None:
    """Time every forward hook of the models that is not among the `known` ids: those of the watchers."""
    for model in models:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    if id(hook) not in known:
                        hooks[key] = watch.timed(hook)


def hook_ids(models: list[Any]) -> set[int]:
    """The ids of all forward hooks of the models."""
    return {
        id(hook)
        for model in models
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    }


def _measure(args: argparse.Namespace, folder: Path) -> list[Claim]:
    from llada_megatron.parallel.training.experts.expert_monitor import ExpertMonitor
    from llada_megatron.parallel.training.metrics_writer import MetricsWriter
    from llada_megatron.tools.bench.our_step import OurStep, masked_batch, run_config
    from llada_megatron.tools.bench.train import CLIP, LEARNING_RATE, LENGTH, MODELS

    model = MODELS["moe"]
    run = run_config(model, args.sequences, LENGTH, LEARNING_RATE, CLIP)
    ours = OurStep(run)
    batch = masked_batch(model, args.sequences, LENGTH, seed=0)
    ours.step(batch)
    plain = [_seconds(lambda: ours.step(batch)) for _ in range(args.steps)]
    known, hooks, readings = hook_ids(ours.models), Stopwatch(), []
    monitor = ExpertMonitor(run, ours.models)
    wrap_hooks(ours.models, known, hooks)
    monitor.routers.look = hooks.timed(monitor.routers.look)  # type: ignore[method-assign]
    steps: list[float] = []
    in_hooks: list[float] = []
    with MetricsWriter(folder, experts=True) as writer:
        for interval in range(args.intervals + 1):
            for _ in range(args.steps):
                seconds = _seconds(lambda: ours.step(batch))
                if interval:
                    steps.append(seconds)
                    in_hooks.append(hooks.take())
                hooks.take()
            spent = _seconds(partial(_read, monitor, writer, args.steps, (interval + 1) * args.steps))
            if interval:
                readings.append(spent)
    step, hook, reading = statistics.median(steps), statistics.mean(in_hooks), statistics.median(readings)
    message(f"a step {1000 * step:.1f} ms with watchers, {1000 * statistics.median(plain):.1f} ms before them")
    share = (hook + reading / args.steps) / step
    return [
        at_most("watching the experts, share of a step", share, "", GOAL),
        reported("hooks in the passes of a step", hook * 1e6, "us"),
        reported(f"reading and writing, once in {args.steps} steps", reading * 1e6, "us"),
        reported("training step", step * 1e3, "ms"),
    ]


def _read(monitor: Any, writer: Any, steps: int, number: int) -> None:
    reading = monitor.read(steps)
    writer.write(number, {"consumed_sequences": number, **reading.scalars(1.0)})
    writer.write_experts(number, reading.line(), reading.image())
    writer.flush()


def _seconds(work: Callable[[], object]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
