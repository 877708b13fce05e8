"""The part of the command line that `llada sample`, `llada watch` and `llada chat` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from llada_megatron.launch.sampling.prompt_sources import PromptOptions
from llada_megatron.llada_moe.config.fp8 import INFERENCE_RECIPES
from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout, data_parallel_for_experts
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.parallel.sampling.prompts import GAP_WORD, Extent
from llada_megatron.parallel.sampling.settings import GraphUse, Settings

_PARTS = ("schedule", "cache", "editor")
_AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel", "data_parallel")


def add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add CHECKPOINT, the overrides, and `--tokenizer`. If `optional`, CHECKPOINT may be missing."""
    text = "a run's output directory, or one of its checkpoints"
    if optional:
        parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    else:
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="schedule.…, cache.…, editor.…, layout.…")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the checkpoint's tokenizer is now, if it was moved")


def add_prompt_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say what is done with a text; `prompt_options_of` reads them."""
    group.add_argument("--infill", action="store_true", help="fill the gaps of a text instead of continuing it")
    group.add_argument("--gap-word", metavar="WORD", help=f"gaps are <WORD>, <WORD:N> (default: {GAP_WORD})")
    group.add_argument("--edit", metavar="START:END", help="replace these characters (of token ids: tokens)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="length of a continuation (64), or of an edit")


def prompt_options_of(args: argparse.Namespace) -> PromptOptions:
    """The options of `add_prompt_options`. Raises ConfigError for options that exclude each other."""
    if args.edit is not None and args.infill:
        raise ConfigError("--edit and --infill: a text is edited at START:END, or its gaps are filled")
    if args.gap_word is not None and not args.infill:
        raise ConfigError("--gap-word belongs to --infill")
    if args.max_new_tokens is not None and args.infill:
        raise ConfigError("--max-new-tokens and --infill: a gap itself says how many tokens it has, such as <mask:5>")
    extent = None if args.edit is None else Extent.parse(args.edit)
    return PromptOptions(args.infill, args.gap_word or GAP_WORD, extent, args.max_new_tokens)


def add_method(parser: argparse.ArgumentParser, temperature: float = 0.0, batched: bool = True) -> None:
    """Add the options of the sampling method. If not `batched`, there is no `--batch-size`."""
    group = parser.add_argument_group("how it is written")
    group.add_argument("--preset", metavar="NAME", help="a published method (llada sample --list-presets)")
    group.add_argument("--schedule", metavar="NAME", help="rule for which masks a step fills, instead of the preset's")
    group.add_argument("--cache", metavar="NAME", help="rule for which keys of earlier passes are reused")
    group.add_argument("--editor", metavar="NAME", help="rule by which sampled tokens may change")
    group.add_argument(
        "--trained-for-editing", action="store_true", help="state that this model was trained for editing"
    )
    group.add_argument("--steps", type=int, metavar="N", help="forward passes per text (default: one per token)")
    group.add_argument("--block-length", type=int, metavar="N", help="sample in blocks of N tokens, left to right")
    group.add_argument(
        "--remasking",
        choices=["low_confidence", "random"],
        help="which predictions fixed steps keep: short for --schedule steps or random",
    )
    group.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 = the most probable token"
    )
    group.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0 = off)")
    group.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    group.add_argument(
        "--cuda-graphs",
        choices=get_args(GraphUse),
        default="auto",
        help="whether a GPU replays passes as CUDA graphs (auto = where it can)",
    )
    group.add_argument(
        "--fp8", choices=INFERENCE_RECIPES, help="keep the layers' weights in FP8 and compute in it, on a GPU"
    )
    if batched:
        group.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts that run together")


def settings_of(args: argparse.Namespace, default_tokens: int = 64) -> Settings:
    """The command line, checked as far as that needs no model.

    Raises:
        ConfigError: a number or an override that cannot be.
        CheckpointError: there is no such directory.
    """
    for name in ("max_new_tokens", "steps", "block_length", "batch_size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
    if not args.temperature >= 0:
        raise ConfigError(f"--temperature {args.temperature}: 0 or more")
    if args.checkpoint is None:
        raise ConfigError("which CHECKPOINT? Give a run's output directory, or one of its checkpoints")
    require_checkpoint(args.checkpoint)
    method, axes = _split(args.overrides)
    if args.steps is not None:
        method["schedule.steps"] = str(args.steps)
    return Settings(
        checkpoint=args.checkpoint,
        tokenizer=args.tokenizer,
        preset=args.preset,
        schedule=_schedule(args),
        cache=args.cache,
        editor=args.editor,
        overrides=method,
        block_length=args.block_length,
        trained_for_editing=args.trained_for_editing,
        max_new_tokens=args.max_new_tokens or default_tokens,
        temperature=args.temperature,
        guidance=args.guidance,
        seed=args.seed,
        batch_size=getattr(args, "batch_size", 1),
        cuda_graphs=args.cuda_graphs,
        fp8=args.fp8,
        layout=_layout(axes, args.checkpoint),
    )


def require_checkpoint(path: str) -> None:
    """Refuse what is no directory. Raises CheckpointError."""
    if not Path(path).is_dir():
        hub = path.count("/") == 1 and not path.startswith(("/", "."))
        more = f"; of a repository of the Hugging Face hub, `llada convert import {path} OUT` comes first"
        raise CheckpointError(f"there is no checkpoint at {path}{more if hub else ''}")


def layout_of(overrides: Sequence[str], checkpoint: str) -> LayoutConfig:
    """The layout of a command without a sampling method. Raises ConfigError for anything but `layout.AXIS=N`."""
    method, axes = _split(overrides)
    if method:
        raise ConfigError(f"{next(iter(method))}: nothing is sampled here; {', '.join(f'layout.{a}=N' for a in _AXES)}")
    return _layout(axes, checkpoint)


def inputs_of(args: argparse.Namespace) -> list[str | Path | None]:
    """The files and folders that the command line reads, which no output may overwrite.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, tokenizer_folder

    files = args.file if isinstance(args.file, list) else [args.file]
    carried = tokenizer_folder(find_checkpoints(args.checkpoint)[0])
    return [*files, getattr(args, "prompts", None), args.tokenizer, carried]


def _schedule(args: argparse.Namespace) -> str | None:
    """The schedule's name. `--remasking` stands for one of the two schedules with fixed steps."""
    if args.remasking is None:
        return args.schedule
    meant = {"low_confidence": "steps", "random": "random"}[args.remasking]
    if args.schedule not in (None, meant):
        raise ConfigError(f"--remasking {args.remasking} is --schedule {meant}; give one of them")
    return meant


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Divide overrides into settings of the method and axes of the layout. Raises ConfigError for anything else."""
    method: dict[str, str] = {}
    axes: dict[str, int] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        part, _, name = key.partition(".")
        if part in _PARTS and name and equals:
            method[key] = value
        elif part == "layout" and name in _AXES and value.isdecimal():
            axes[name] = int(value)
        else:
            usable = [*(f"{part}.KEY=VALUE" for part in _PARTS), *(f"layout.{axis}=N" for axis in _AXES)]
            raise ConfigError(f"{text}: sampling takes {', '.join(usable)}")
    return method, axes


def _layout(axes: dict[str, int], checkpoint: str) -> LayoutConfig:
    """The layout to sample under, with as many data-parallel ranks as its expert parallelism needs.

    Raises:
        ConfigError: an axis that does not fit the model.
    """
    if not axes:
        return LayoutConfig()
    cut = [axes.get(name, 1) for name in ("tensor_parallel", "expert_parallel", "expert_tensor_parallel")]
    values: dict[str, Any] = {"data_parallel": data_parallel_for_experts(*cut)} | axes
    layout = LayoutConfig(**values)
    _check_layout(layout, checkpoint)
    return layout


def _check_layout(layout: LayoutConfig, checkpoint: str) -> None:
    """Refuse a layout that the checkpoint's model cannot be spread over. Raises ConfigError."""
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of

    run = run_of(find_checkpoints(checkpoint)[0])
    training_layout = replace(layout, sequence_parallel=layout.tensor_parallel > 1)  # a condition of training only

    def refuse(key: str, reason: str) -> None:
        raise ConfigError(f"{key}: {reason}")

    check_layout(run.model, training_layout, refuse)
