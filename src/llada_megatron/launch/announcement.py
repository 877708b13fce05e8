"""What a training says first, in one line: model, parameters, layout, tokens, and about how long it will take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import count_text, rate_text
from llada_megatron.launch.ranks.local import threads_per_rank
from llada_megatron.launch.ranks.rank import available_cores
from llada_megatron.llada_moe.model.flops import flops_per_token
from llada_megatron.llada_moe.model.parameters import count_parameters, trained_parameters
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel.checkpoint.manifest import steps
from llada_megatron.parallel.training.metrics_file import last_metrics

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig

ASSUMED_UTILIZATION = 0.25
"""Share of the measured peak that the estimate before the first step assumes, and says so: what `make demo` reaches on
two cores. Larger models reach more (docs/benchmarks.md), and take less time than is said."""

_PEAK_SECONDS = 0.1


def announcement(run: RunConfig, here: bool = True) -> str:
    """The line. Measures the machine for a tenth of a second where there is no GPU and the run has no pace yet.

    `here`: all ranks are on this machine, and none of them runs yet; otherwise nothing is measured.
    """
    count, tokens = count_parameters(run.model), run.training.global_batch_size * run.training.sequence_length
    active = f" ({count_text(count.active)} per token)" if count.active != count.total else ""
    trained = trained_parameters(run.model, run.training)
    part = f", of which {count_text(trained)} are trained" if trained != count.trainable else ""
    if run.training.lora is not None:
        part = f", and {count_text(trained)} of LoRA, which are trained"
    done = _steps_done(run)
    left = f"{run.training.steps - done:,} of {run.training.steps:,}" if done else f"{run.training.steps:,}"
    name = Path(run.output_dir).absolute().name
    parts = (
        f"{name}: {run.model.family} model, {count_text(count.total)} parameters{active}{part}",
        _layout_text(run),
        f"{left} steps of {tokens:,} tokens = {count_text((run.training.steps - done) * tokens)} tokens",
        _time_text(run, done, here),
        f"logs in {Path(run.output_dir) / 'logs'}",
    )
    return "; ".join(parts)


def kernels() -> str | None:
    """Whose kernels this process computes with, in one line, and why not with Transformer Engine's where these are
    installed; None without a GPU."""
    import torch

    from llada_megatron.llada_moe.model.accelerations import apex, in_words, transformer_engine

    if not torch.cuda.is_available():
        return None
    engine, other = transformer_engine(), apex()
    if engine.active:
        return f"kernels: Transformer Engine {in_words(engine)}"
    taken = f"torch, and Apex {in_words(other)}" if other.active else "torch"
    return f"kernels: {taken}; Transformer Engine is not used: {in_words(engine)}"


def _steps_done(run: RunConfig) -> int:
    found = steps(Path(run.output_dir) / "checkpoints")
    return min(found[0][0], run.training.steps) if found else 0


def _layout_text(run: RunConfig) -> str:
    ranks = run.layout.world_size
    axes = [f"{name} {size}" for name, size in vars(run.layout).items() if name.endswith("_parallel") and size > 1]
    return f"{ranks} {'process' if ranks == 1 else 'processes'}" + (f" ({', '.join(axes)})" if axes else "")


def _time_text(run: RunConfig, done: int, here: bool) -> str:
    """How long the rest takes, and what that is taken from."""
    left = run.training.steps - done
    before = last_metrics(run.output_dir, "seconds_per_step").get("seconds_per_step") if done else None
    if left <= 0:
        return "nothing is left to train"
    if before:
        return f"about {duration_text(left * before)} at its pace so far"
    peak = _cpu_peak(run) if here else None
    if peak is None:
        return "the time is known after the first steps"
    copies = make_objective(run.objective, run.training).pattern(done).copies
    frozen = run.training.lora is not None
    work = flops_per_token(run.model, run.training.sequence_length, copies=copies, frozen=frozen).total
    seconds = left * run.training.global_batch_size * run.training.sequence_length * work / (ASSUMED_UTILIZATION * peak)
    reached = f"{ASSUMED_UTILIZATION:.0%} of the measured {rate_text(peak)} {run.training.precision}"
    return f"about {duration_text(seconds)} if it reaches {reached}"


def _cpu_peak(run: RunConfig) -> float | None:
    """FLOP/s of all ranks together on this machine's cores; None where there is a GPU."""
    import torch

    from llada_megatron.parallel.training.peak import matmul_peak

    if torch.cuda.is_available():
        return None
    ranks = run.layout.world_size
    threads = int(os.environ.get("OMP_NUM_THREADS") or threads_per_rank(ranks))
    dtype = torch.bfloat16 if run.training.precision == "bf16" else torch.float32
    share = min(available_cores(), ranks * threads) / torch.get_num_threads()
    return share * matmul_peak("cpu", dtype, _PEAK_SECONDS)


def duration_text(seconds: float) -> str:
    """A duration to two figures in its largest unit: `40 s`, `6 min`, `3.2 h`, `12 days`."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, size = next(((unit, size) for unit, size in units if seconds >= 1.5 * size), units[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"
