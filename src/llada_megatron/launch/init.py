"""`llada init`: a commented run file for a model and a machine, and a JSON Schema for editors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.overwriting import refuse_overwriting

if TYPE_CHECKING:
    from llada_megatron.launch.layout_choice import Machine
    from llada_megatron.llada_moe.config.model import ModelConfig

EXAMPLES = """\
examples:
  llada init small-moe --data data/mine --output run.yaml              for this machine
  llada init llada2-mini --cluster dgx-h100 --nodes 4 --output run.yaml   for 4 nodes of configs/clusters/dgx-h100.yaml
  llada init imported/llada-8b --data data/mine --output run.yaml      train on from an import, or from a run
  llada init small-moe --output run.yaml --schema run.schema.json      and what an editor needs to check and complete it

MODEL is a name in configs/models, a YAML file of a model, or the directory of an import or a run, whose weights are
started from. The layout is the one that cuts the model least and fits; what is published for a model in configs/runs is
taken over. Every key is in the file with its meaning; those that keep their default are comments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada init`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, YAML file, or directory of weights")
    parser.add_argument("--data", default="data/mine", metavar="PREFIX", help="the prepared set (default: %(default)s)")
    parser.add_argument("--cluster", metavar="CLUSTER", help="YAML file or name of a cluster (default: this machine)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the cluster (default: 1)")
    parser.add_argument(
        "--rank-memory", type=float, metavar="GB", help="memory of a cluster's rank (default: 80 with GPUs, 4 without)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the run file here (default: standard output)")
    parser.add_argument("--schema", metavar="FILE", help="write a JSON Schema of run files here")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    """Write the files; raises ConfigError, DataError or ResourceError."""
    from llada_megatron.launch.run_template import render
    from llada_megatron.llada_moe.config.documentation import json_schema

    if args.model is None and args.schema is None:
        raise ConfigError("which MODEL? Its names: " + ", ".join(_model_names()) + "; or --schema FILE alone")
    if args.nodes < 1:
        raise ConfigError(f"--nodes {args.nodes}: at least 1")
    if args.rank_memory is not None and not args.rank_memory > 0:
        raise ConfigError(f"--rank-memory {args.rank_memory}: greater than 0")
    outputs = [path for path in (args.output, args.schema) if path]
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise ConfigError(f"--output and --schema are both {args.output}: give two names")
    refuse_overwriting("--output, --schema", outputs, [args.model, args.cluster])
    for path in outputs:
        if Path(path).exists() and not args.overwrite:
            raise ConfigError(f"{path} is there already; give another name, or --overwrite")
    text = None
    if args.model is not None:
        text = render(*_choices(args), _schema_beside(args))
    if args.schema is not None:
        _write(Path(args.schema), json.dumps(json_schema(), indent=1) + "\n")
    if text is not None and args.output is not None:
        _write(Path(args.output), text)
        message(f"next: llada inspect {args.output}, then llada train {args.output}")
    elif text is not None:
        sys.stdout.write(text)
    if args.json:
        emit_json({"output": args.output, "schema": args.schema})
    return 0


def _choices(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The values that the file sets, as nested mappings, and notes for its head."""
    from llada_megatron.launch.layout_choice import choose_layout
    from llada_megatron.launch.run_template import start_values

    model, named, weights = _model(args.model)
    machine, where = _machine(args)
    named, facts = _fitted(named, model, args.data)
    values, source = start_values(args.model, model, machine, choose_layout(model, machine))
    values["model"] = named
    values["data"] = values.get("data", {}) | {"sets": [{"path": args.data}]}
    values["output_dir"] = f"runs/{Path(args.output).stem if args.output else 'mine'}"
    if weights:
        values["checkpoint"] = values.get("checkpoint", {}) | {"load": weights}
    return values, [f"{args.model} for {where}. {source}", *facts]


def _model_names() -> list[str]:
    from llada_megatron.llada_moe.config.named import MODELS

    return MODELS.names()


def _model(name: str) -> tuple[ModelConfig, Any, str | None]:
    """The model, what stands under `model` in the run file, and the directory of weights to start from."""
    from llada_megatron.llada_moe.config import load_model, to_dict
    from llada_megatron.parallel.checkpoint.search import find_checkpoints, run_of

    folder = Path(name)
    if not folder.is_dir() or name in _model_names():  # a folder of that name is ./NAME
        return load_model(name), name, None
    model = run_of(find_checkpoints(folder)[0]).model
    if (folder / "model.yaml").is_file():
        return model, str(folder / "model.yaml"), name
    return model, to_dict(model), name


def _fitted(named: Any, model: ModelConfig, prefix: str) -> tuple[Any, list[str]]:
    """What stands under `model`, with the vocabulary of a prepared set that there is already; and notes on it."""
    from llada_megatron.llada_moe.data.set_manifest import read_manifest

    if not Path(f"{prefix}.json").is_file():
        ids = f"mask token {model.mask_token_id}, end of text {model.eos_token_id}"
        return named, [f"Prepare {prefix} with the model's tokenizer ({model.vocab_size:,} ids, {ids})."]
    facts = read_manifest(prefix).tokenizer
    changed = {"mask_token_id": facts.mask_id, "eos_token_id": facts.eos_id}
    if facts.vocab_size > model.vocab_size or any(getattr(model, key) != value for key, value in changed.items()):
        changed["vocab_size"] = facts.vocab_size
        over = named if isinstance(named, dict) else {"base": named}
        return over | changed, [f"The vocabulary is that of {prefix}, not the published one."]
    return named, []


def _machine(args: argparse.Namespace) -> tuple[Machine, str]:
    """What the run is laid out for, and that in words."""
    import psutil

    from llada_megatron.launch.cluster.config import load_cluster
    from llada_megatron.launch.layout_choice import Machine
    from llada_megatron.launch.ranks.rank import available_cores

    if args.cluster is not None:
        cluster = load_cluster(args.cluster)
        ranks = args.nodes * cluster.ranks_per_node
        precision, usual = ("bf16", 80.0) if cluster.gpus_per_node else ("fp32", 4.0)
        memory = args.rank_memory or usual
        nodes = f"{args.nodes} {'node' if args.nodes == 1 else 'nodes'}"
        what = f"{ranks} ranks of {memory:g} GB on {nodes} of {args.cluster}"
        return Machine(ranks, cluster.ranks_per_node, memory * 1e9, precision), what
    if args.nodes != 1 or args.rank_memory is not None:
        raise ConfigError("--nodes and --rank-memory go with --cluster")
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(count))
        return Machine(count, count, memory, "bf16"), f"the {count} GPUs of this machine"
    ranks = 2 if available_cores() > 1 else 1  # further cores work as threads of the ranks
    return Machine(ranks, ranks, psutil.virtual_memory().total / ranks, "fp32"), "the CPUs of this machine"


def _schema_beside(args: argparse.Namespace) -> str | None:
    """The way from the run file to the schema."""
    if args.schema is None or args.output is None:
        return None
    return os.path.relpath(args.schema, Path(args.output).parent)


def _write(path: Path, text: str) -> None:
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.absolute().parent}")
    path.write_text(text, "utf-8")
    message(f"{path} is written")
