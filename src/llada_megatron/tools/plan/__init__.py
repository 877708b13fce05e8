"""`llada plan`: what a run needs of each GPU and how long it takes, before anything is asked for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.planning.estimate import Assumptions
    from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet

EXAMPLES = """\
examples:
  llada plan llada-8b-pretrain --gpu h100                       a run of configs/runs on the GPUs of its layout
  llada plan llada2-flash-pretrain --gpus 256 --gpu h200        on another number of GPUs: data_parallel follows
  llada plan llada-moe-7b-a1b-pretrain --gpus 64 --search       the fastest layouts that fit, and why others do not
  llada plan my_run.yaml --gpu my_gpu.yaml --imbalance 1.8      a GPU of your own, and less even experts
  llada plan my_run.yaml --profile experts/profile.json         the loads that `llada experts --output` measured

A GPU's file needs name, memory_gib, bf16_tflops, memory_gb_per_s, link_gb_per_s and network_gb_per_s. Nothing is
started, and no GPU is needed. The figures are estimates: what they assume is printed below them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llada plan`."""
    parser.add_argument("config", metavar="RUN", help="YAML file of a run, or a name in configs/runs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys laid over the file")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many GPUs (default: those of the layout)")
    parser.add_argument("--gpu", default="h100", metavar="NAME|FILE", help="a name in configs/gpus (default: h100)")
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument(
        "--imbalance", type=float, default=1.3, help="rows of the fullest expert rank over the mean (default: 1.3)"
    )
    loads.add_argument("--profile", metavar="FILE", help="the same from a profile.json of `llada experts`, by layer")
    parser.add_argument("--documents", type=float, default=1.0, help="documents in a window (default: 1)")
    parser.add_argument("--html", metavar="FILE", help="write the plan with pictures as one HTML file")
    parser.add_argument("--search", action="store_true", help="rank the layouts of these GPUs")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts that --search shows (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is 1 where it does not fit.

    Raises:
        ConfigError: an unknown GPU, or one that cannot run the run's FP8, GPUs that the layout does not divide, a
            profile of another model, or a figure that cannot be.
        DataError: --profile is no profile.
        ResourceError: with --search, no layout fits; with the fewest GPUs on which one would.
    """
    from llada_megatron.llada_moe.config import load_run
    from llada_megatron.llada_moe.planning.estimate import Assumptions
    from llada_megatron.llada_moe.planning.expert_loads import read_loads
    from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
    from llada_megatron.parallel.fp8.recipes import require_sheet

    check_figures(args)
    gpu = load_gpu(args.gpu)
    config = load_run(args.config, args.overrides, message)
    require_sheet(config.training.fp8, gpu, f"--gpu {args.gpu}")
    loads = None if args.profile is None else read_loads(args.profile, config.model)
    assumed = Assumptions(args.imbalance, args.documents, loads)
    if args.search:
        return _search(config, args, gpu, assumed)
    return _plan(config, args, gpu, assumed)


def check_figures(args: argparse.Namespace) -> None:
    """Refuse figures that cannot be. Raises ConfigError."""
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: at least 1")
    if args.html is not None and args.search:
        raise ConfigError("--html shows one layout, and --search ranks many; leave one of them out")
    if args.top < 1:
        raise ConfigError(f"--top {args.top}: at least 1")
    for name, why in (("imbalance", "1 = every expert rank gets the same"), ("documents", "1 = one fills a window")):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 1):
            raise ConfigError(f"--{name} {value:g}: a number of at least 1 ({why})")


def _plan(config: RunConfig, args: argparse.Namespace, gpu: GpuSheet, assumed: Assumptions) -> int:
    from llada_megatron.llada_moe.planning.estimate import Estimate
    from llada_megatron.llada_moe.planning.layout_search import spread_over
    from llada_megatron.tools.plan.page import page
    from llada_megatron.tools.plan.report import report, values

    spread = config if args.gpus is None else spread_over(config, args.gpus)
    from llada_megatron.parallel.meta_ranks import count_stages  # imports Megatron, only where the layout is possible

    estimate = Estimate(spread, gpu, assumed, count_stages(spread.model, spread.layout))
    print(report(estimate))
    if args.html is not None:
        Path(args.html).write_text(page(estimate), "utf-8")
        message(f"pictures: {args.html}")
    if args.json:
        emit_json(values(estimate))
    return 0 if estimate.fits else 1


def _search(config: RunConfig, args: argparse.Namespace, gpu: GpuSheet, assumed: Assumptions) -> int:
    from llada_megatron.llada_moe.planning.layout_search import fewest_gpus, search
    from llada_megatron.tools.plan.report import search_table, values

    gpus = args.gpus or config.layout.world_size
    found = search(config, gpus, gpu, assumed)
    if not found.examined:
        reasons = ", ".join(key for key, _ in found.refused.most_common(3))
        raise ConfigError(f"--gpus {gpus}: no layout divides them (by {reasons}); take another number")
    if not found.ranked:
        needed = fewest_gpus(config, gpu, assumed, gpus)
        least = found.too_large[0].card_bytes / 2**30
        raise ResourceError(
            f"no layout of {gpus} x {gpu.name} fits: the smallest needs {least:.1f} of {gpu.memory_gib:g} GiB; "
            + (
                f"of 2, 4, 8, … times as many, the fewest GPUs that would are {needed}"
                if needed
                else "2, 4, 8, … times as many would not either"
            )
        )
    print(search_table(found, args.top, config))
    if args.json:
        emit_json(
            {
                "examined": found.examined,
                "fit": len(found.ranked),
                "refused": found.refused,
                "best": [values(each) for each in found.ranked[: args.top]],
            }
        )
    return 0
