"""`llada convert`: import and export Hugging Face checkpoints, give a dense one experts, compare two, look into one."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message, size_text
from llada_megatron.llada_moe.config.layout import LayoutConfig, data_parallel_for_experts
from llada_megatron.llada_moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  llada convert import LLaDA-8B-Base/ checkpoints/llada-8b                 one shard; any layout can load it
  llada convert import inclusionAI/LLaDA2.0-mini checkpoints/mini          downloaded from the Hugging Face hub
  llada convert import LLaDA2.0-flash/ checkpoints/flash --layout tensor_parallel=4,expert_parallel=8
  llada convert export runs/mine published/mine --dtype bf16               the newest checkpoint of a run
  llada convert export runs/lora published/adapter --adapter               the factors of a LoRA run, for peft
  llada convert upcycle runs/dense checkpoints/moe --experts 8 --top-k 2   every expert a copy of the feed-forward
  llada convert verify checkpoints/llada-8b published/llada-8b             tensor by tensor, then logits
  llada convert inspect LLaDA-MoE-7B-A1B-Base/                             what is in it, what is missing"""
ANY_KIND = "a Hugging Face directory, a run's directory, or a step-… directory"
DTYPES = ("bf16", "fp32")
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions: import, export, upcycle, verify and inspect."""
    names = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    read = names.add_parser("import", help="a Hugging Face checkpoint to a sharded one")
    read.add_argument(
        "source", metavar="HF_DIR", help="directory with config.json and *.safetensors, or ORG/NAME[@REVISION]"
    )
    read.add_argument("target", metavar="OUT", help="directory to make: checkpoints/, tokenizer/, model.yaml")
    read.add_argument("--mask-token-id", type=int, metavar="ID", help="for a model that was not trained with masks")
    write = names.add_parser("export", help="a sharded checkpoint to the format its family is published in")
    write.add_argument("source", metavar="CHECKPOINT", help="a run's directory, or one of its step-… directories")
    write.add_argument("target", metavar="HF_DIR", help="directory to make")
    write.add_argument("--shard-size", default="5GB", metavar="SIZE", help="most bytes per file (default: 5GB)")
    tokenizer = write.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="PATH", help="where the checkpoint's tokenizer is, if it has moved")
    tokenizer.add_argument("--without-tokenizer", action="store_true", help="export the weights without a tokenizer")
    write.add_argument("--adapter", action="store_true", help="only the factors of a LoRA run, as peft loads them")
    write.add_argument("--base-model", metavar="NAME", help="model that --adapter belongs to (default: as imported)")
    write.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face hub, to a private repository")
    sparse = names.add_parser(
        "upcycle", help="a dense sharded checkpoint to a mixture of experts that computes the same"
    )
    sparse.add_argument("source", metavar="CHECKPOINT", help="a run's directory, or one of its step-… directories")
    sparse.add_argument("target", metavar="OUT", help="directory to make: checkpoints/, tokenizer/, model.yaml")
    _add_upcycle_arguments(sparse)
    compare = names.add_parser("verify", help="whether two checkpoints of any two kinds hold the same model")
    compare.add_argument("source", metavar="A", help=ANY_KIND)
    compare.add_argument("target", metavar="B", help="likewise")
    compare.add_argument(
        "--tolerance", type=float, default=0.0, metavar="X", help="largest difference of a weight (default: same bits)"
    )
    compare.add_argument("--text", metavar="FILE", help="compare the logits on this text (default: a few sentences)")
    compare.add_argument("--no-logits", action="store_true", help="compare the tensors only")
    look = names.add_parser("inspect", help="family, sizes, parameters, dtypes, what is missing or too much")
    look.add_argument("source", metavar="DIR", help=ANY_KIND)
    for direction in (read, write, sparse):
        direction.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    for direction in (read, sparse):
        direction.add_argument("--layout", metavar="AXIS=N,…", help="cut it for these ranks (default: one shard)")
    for action in (read, write, sparse, compare):
        action.add_argument("--workers", type=int, metavar="N", help="tensors at a time (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    if getattr(args, "workers", None) is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least 1")
    actions = {"import": _import, "export": _export, "upcycle": _upcycle, "verify": _verify, "inspect": _inspect}
    return actions[args.action](args)


def parse_size(text: str) -> int:
    """Bytes that `5GB`, `500MB` or `2GiB` means. Raises ConfigError: the text is not a size."""
    number = text.strip().upper()
    unit = next((unit for unit in sorted(SIZE_UNITS, key=len, reverse=True) if number.endswith(unit)), "")
    try:
        size = int(float(number.removesuffix(unit)) * SIZE_UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"--shard-size {text}: a size such as 5GB, 500MB or 2GiB")
    return size


AXES = ("tensor_parallel", "pipeline_parallel", "pipeline_chunks_per_rank", "expert_parallel", "expert_tensor_parallel")
"""The axes of a layout that cut weights; the ranks of the others hold copies."""


def parse_layout(text: str | None) -> LayoutConfig:
    """The layout that `tensor_parallel=2,expert_parallel=4` means, with the data-parallel ranks that its experts need.

    Raises:
        ConfigError: an axis cuts no weights or is given twice, or a value is not a whole number from 1.
    """
    axes: dict[str, int] = {}
    for setting in text.split(",") if text else ():
        name, _, value = setting.strip().partition("=")
        if name not in AXES or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--layout {setting}: it takes {', '.join(f'{axis}=N' for axis in AXES)}, with commas")
        if name in axes:
            raise ConfigError(f"--layout {text}: {name} twice")
        axes[name] = int(value)
    tensor = axes.get("tensor_parallel", 1)
    data = data_parallel_for_experts(tensor, axes.get("expert_parallel", 1), axes.get("expert_tensor_parallel", 1))
    return LayoutConfig(**axes, data_parallel=data, sequence_parallel=tensor > 1)


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype that `--dtype` names."""
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _import(args: argparse.Namespace) -> int:
    from llada_megatron.tools.convert.hub import download, is_repository
    from llada_megatron.tools.convert.importer import ImportOptions, import_checkpoint
    from llada_megatron.tools.convert.tasks import default_workers

    options = ImportOptions(
        layout=parse_layout(args.layout),
        dtype=dtype_named(args.dtype),
        mask_token_id=args.mask_token_id,
        workers=args.workers or default_workers(),
    )
    source = Path(args.source)
    if is_repository(args.source):
        source = download(args.source)
    return _report(args, import_checkpoint(source, Path(args.target), options), "checkpoint")


def _export(args: argparse.Namespace) -> int:
    from llada_megatron.tools.convert.adapter_exporter import export_adapter
    from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint
    from llada_megatron.tools.convert.hub import push, require_push
    from llada_megatron.tools.convert.tasks import default_workers

    options = ExportOptions(
        dtype=dtype_named(args.dtype),
        shard_bytes=parse_size(args.shard_size),
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        without_tokenizer=args.without_tokenizer,
        workers=args.workers or default_workers(),
    )
    if args.base_model and not args.adapter:
        raise ConfigError("--base-model goes with --adapter: a whole export needs no other model")
    if args.push:
        require_push(args.push)
    source, target = Path(args.source), Path(args.target)
    if args.adapter:
        summary = export_adapter(source, target, args.base_model, options.dtype, options.workers)
    else:
        summary = export_checkpoint(source, target, options)
    if args.push:
        summary["pushed_to"] = push(Path(args.target), args.push)
    return _report(args, summary, "directory")


def _add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Which experts `upcycle` makes."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--experts", type=int, metavar="N", help="how many, in every layer or all but the first ones")
    which.add_argument(
        "--model", metavar="MODEL", help="the whole model to make: a name of configs/models, or a YAML file"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="experts of a token, with --experts (default: 2)")
    parser.add_argument("--dense-layers", type=int, metavar="N", help="first layers without experts (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the router's weights (default: 0)")


def _upcycle(args: argparse.Namespace) -> int:
    from llada_megatron.tools.convert.tasks import default_workers
    from llada_megatron.tools.convert.upcycler import UpcycleOptions, upcycle_checkpoint

    if args.model and (args.top_k is not None or args.dense_layers is not None):
        raise ConfigError(
            "--model says how many experts a token takes and which layers have them: leave out the option"
        )
    options = UpcycleOptions(
        model=args.model,
        experts=args.experts or 0,
        top_k=2 if args.top_k is None else args.top_k,
        leading_dense_layers=args.dense_layers or 0,
        layout=parse_layout(args.layout),
        dtype=dtype_named(args.dtype),
        seed=args.seed,
        workers=args.workers or default_workers(),
    )
    summary = upcycle_checkpoint(Path(args.source), Path(args.target), options)
    return _report(args, summary | {"format": f"{summary['experts']} experts a layer"}, "checkpoint")


def _report(args: argparse.Namespace, summary: dict[str, Any], place: str) -> int:
    for note in summary["notes"]:
        message(f"note: {note}")
    print(
        f"{summary[place]}: {summary['format']}, {summary['tensors']:,} tensors, {summary['parameters']:,} parameters, "
        f"{size_text(summary['bytes'])}"
    )
    if args.json:
        emit_json(summary)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from llada_megatron.tools.convert.inspector import open_source
    from llada_megatron.tools.convert.tasks import default_workers
    from llada_megatron.tools.convert.verifier import verify

    if not 0 <= args.tolerance < math.inf:
        raise ConfigError(f"--tolerance {args.tolerance}: a number, 0 or more")
    text = _text(args.text) if args.text else None
    a, b = open_source(Path(args.source)), open_source(Path(args.target))
    try:
        result = verify(a, b, args.tolerance, args.workers or default_workers(), text, logits=not args.no_logits)
    finally:
        a.close()
        b.close()
    print("\n".join(result["lines"]))
    if args.json:
        emit_json(result)
    return 0 if result["equal"] else 1


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--text {path}: cannot be read ({error.strerror}); name a file of text") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start:,})") from None


def _inspect(args: argparse.Namespace) -> int:
    from llada_megatron.tools.convert.inspector import as_text, describe, open_source

    source = open_source(Path(args.source))
    try:
        found = describe(source)
    finally:
        source.close()
    print(as_text(found))
    if args.json:
        emit_json(found)
    return 1 if found["faults"] else 0
