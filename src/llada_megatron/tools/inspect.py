"""`llada inspect`: what a configuration means before anything runs: resolved keys, parameters, what each rank holds."""

from __future__ import annotations

import argparse
from typing import Any

from llada_megatron.console import count_text, emit_json, message
from llada_megatron.llada_moe.config import (
    ModelConfig,
    RunConfig,
    dump_yaml,
    find_model_and_run,
    load_model,
    load_run,
    to_dict,
)
from llada_megatron.llada_moe.model.parameters import ParameterCount, RankShare, count_parameters, rank_shares
from llada_megatron.llada_moe.planning.estimate import GIB, Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu

EXAMPLES = """\
examples:
  llada inspect llada2-flash                                    a model, by its name in configs/models
  llada inspect demo                                            a run of configs/runs: also what each rank holds
  llada inspect llada2-flash-pretrain layout.expert_parallel=64
  llada inspect my_run.yaml                                     a file of yours
  llada inspect llada-8b --json | tail -1 | python -m json.tool"""
LONGEST_TABLE = 16
PART_NAMES = {
    "embedding": "embedding",
    "attention": "attention projections",
    "dense_feed_forward": "dense feed-forward",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "router",
    "expert_bias": "expert bias (buffer)",
    "norms": "layer norms",
    "final_norm": "final norm",
    "output": "output layer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llada inspect`."""
    parser.add_argument(
        "config",
        metavar="MODEL-OR-RUN",
        help="YAML file of a run or a model, or a name in configs/models or configs/runs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys laid over the file")


def run(args: argparse.Namespace) -> int:
    """Print the report; raises ConfigError for a configuration that cannot work."""
    config = _load(args.config, args.overrides)
    model = config.model if isinstance(config, RunConfig) else config
    count = count_parameters(model)
    shares = rank_shares(model, config.layout) if isinstance(config, RunConfig) else []
    print(dump_yaml(config))
    print(parameter_table(count))
    if isinstance(config, RunConfig):
        print(layout_table(config, shares))
        print(f"\n{cost_line(config)}")
    if args.json:
        emit_json(summary(config, count, shares))
    return 0


def _load(name_or_path: str, overrides: list[str]) -> RunConfig | ModelConfig:
    """The model or the run; where a name stands for both, the model, and a message says so."""
    model, run = find_model_and_run(name_or_path)
    if model is None:
        return load_run(run, overrides, message)
    if run is not None:
        message(f"{name_or_path!r} is the name of a model and of a run; this is the model, and {run} is the run")
    return load_model(model, overrides)


def parameter_table(count: ParameterCount) -> str:
    """Each part's parameters, then the totals."""
    rows = [(name, count.parts[part]) for part, name in PART_NAMES.items() if part in count.parts]
    rows += [
        ("total, the published way", count.total),
        ("trainable", count.trainable),
        ("active per token", count.active),
    ]
    lines = [f"  {name:<26}{number:>18,}" for name, number in rows]
    lines.insert(-3, "  " + "-" * 44)
    return "\n".join(["parameters", *lines])


def layout_table(run: RunConfig, shares: list[RankShare]) -> str:
    """One line per group of ranks that hold the same layers and experts."""
    layout = run.layout
    axes = (
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x context {layout.context_parallel} "
        f"x data {layout.data_parallel}"
    )
    micro = run.training.global_batch_size // (run.training.micro_batch_size * layout.data_parallel)
    head = f"\nlayout: {axes} = {layout.world_size} ranks; {micro} micro-batches per step and data-parallel rank"
    groups = [[share] for share in shares]
    if (
        len(shares) > LONGEST_TABLE
    ):  # one line per pipeline stage: its expert ranks differ only in which experts they hold
        groups = [[share for share in shares if share.pipeline == stage] for stage in range(layout.pipeline_parallel)]
    rows = [("ranks", "pp", "ep", "layers", "experts", "parameters each"), *(_row(group) for group in groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([head, *(f"  {line.rstrip()}" for line in lines)])


GPU = "h100"
"""The GPU that a run's cost is shown for; `llada plan` takes any."""


def cost(run: RunConfig) -> Estimate:
    """The run on `GPU`, with what `llada plan` assumes."""
    return Estimate(run, load_gpu(GPU), Assumptions())


def cost_line(run: RunConfig) -> str:
    """Tokens of the whole run, and an estimate of memory and time on `GPU`."""
    estimate = cost(run)
    tokens = estimate.tokens_per_step * run.training.steps
    return (
        f"{count_text(tokens)} tokens in {run.training.steps:,} steps; estimated on {estimate.gpu.name} (`llada plan` "
        f"for others): {estimate.card_bytes / GIB:.1f} GiB a GPU, {duration_text(estimate.run_seconds)}, "
        f"{estimate.gpu_hours:,.1f} GPU-hours"
    )


def duration_text(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two."""
    unit, size = next((each for each in DURATIONS if seconds >= 2 * each[1]), DURATIONS[-1])
    return f"{seconds / size:.1f} {unit}"


DURATIONS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def _row(group: list[RankShare]) -> tuple[str, ...]:
    share = group[0]
    layers = ["embedding"] * share.embedding + [spans(share.layers)] + ["output"] * share.output
    experts = "-"
    if share.experts:
        experts = spans(list(share.experts)) if len(group) == 1 else f"{len(share.experts)} each"
    ranks = sorted(rank for member in group for rank in member.ranks)
    held = [member.expert for member in group]
    return spans(ranks), str(share.pipeline), spans(held), ", ".join(layers), experts, f"{share.parameters:,}"


def spans(numbers: list[int], longest: int = 4) -> str:
    """Ascending runs as `0-3, 8-11`; more than `longest` runs are cut, with the count of all numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(start) if start == end else f"{start}-{end}" for start, end in runs]
    return ", ".join(words) if len(words) <= longest else f"{', '.join(words[:longest])}, … ({len(numbers)})"


def summary(config: RunConfig | ModelConfig, count: ParameterCount, shares: list[RankShare]) -> dict[str, Any]:
    """The report as plain values."""
    report = {
        "config": to_dict(config),
        "parameters": count.total,
        "trainable": count.trainable,
        "active_per_token": count.active,
        "parts": count.parts,
    }
    if isinstance(config, RunConfig):
        report["world_size"] = config.layout.world_size
        estimate = cost(config)
        report["estimate"] = {
            "gpu": estimate.gpu.name,
            "card_bytes": estimate.card_bytes,
            "total_tokens": estimate.tokens_per_step * config.training.steps,
            "run_s": estimate.run_seconds,
            "gpu_hours": estimate.gpu_hours,
        }
        report["ranks"] = [
            {
                "ranks": share.ranks,
                "pipeline": share.pipeline,
                "expert": share.expert,
                "layers": share.layers,
                "experts": list(share.experts or []),
                "embedding": share.embedding,
                "output": share.output,
                "parameters": share.parameters,
            }
            for share in shares
        ]
    return report
