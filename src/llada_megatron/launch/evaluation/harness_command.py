"""`llada eval harness`: tasks of lm-evaluation-harness with a checkpoint, on one process or the ranks of a layout."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.evaluation.harness_work import HarnessPart, HarnessWork
from llada_megatron.launch.evaluation.protocol_options import add_protocol, protocol_of
from llada_megatron.launch.evaluation.published import PublishedFigures, PublishedRow, Verdict, load_published
from llada_megatron.launch.evaluation.spread_job import SpreadJob, run_spread
from llada_megatron.launch.sampling.options import add_method, add_model, settings_of
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.overwriting import refuse_overwriting
from llada_megatron.parallel.sampling.settings import Settings

_OWN = (
    "shots",
    "max_new_tokens",
    "estimator",
    "samples",
    "stratum",
    "preset",
    "schedule",
    "cache",
    "editor",
    "steps",
    "block_length",
    "remasking",
    "temperature",
    "guidance",
    "chat_template",
)
"""Options that published figures have settings of their own for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval harness`."""
    add_model(parser)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--tasks", metavar="A,B", help="tasks and groups of lm_eval, by name")
    what.add_argument(
        "--published",
        metavar="NAME",
        help="measure what was published (llada-8b-base, llada-8b-instruct, or a file), with its settings, and compare",
    )
    what.add_argument("--task-folder", action="append", metavar="DIR", help="folder with task files of your own")
    what.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    what.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    what.add_argument("--chat-template", action="store_true", help="put questions into the checkpoint's chat template")
    what.add_argument(
        "--template", metavar="FILE", help="another chat template: llada, or a file with a Jinja template"
    )
    what.add_argument("--one-turn", action="store_true", help="examples and question in one message of the user")
    what.add_argument("--max-new-tokens", type=int, metavar="N", help="length of answers, whatever the task says")
    what.add_argument("--greedy", action="store_true", help="compute is_greedy: a pass for each token of an answer")
    add_protocol(parser)
    add_method(parser)
    parser.set_defaults(samples=None, temperature=None, guidance=None)  # to tell what was given from what was not
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="all results of lm_eval and the protocol, as JSON")
    output.add_argument("--resume", metavar="FILE", help="keep answers beside FILE; the same command goes on there")
    output.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")


def run(args: argparse.Namespace) -> int:
    """Evaluate; raises ConfigError, DataError or CheckpointError. 1 unless every published figure is met."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval is not installed: pip install 'llada-megatron[eval]'")
    published = None if args.published is None else load_published(args.published)
    _check(args, published is not None and published.chat_template)
    args.temperature, args.guidance = args.temperature or 0.0, args.guidance or 0.0
    settings = settings_of(args, default_tokens=256)
    if args.output is not None:
        refuse_overwriting("--output", [Path(args.output)], [args.tokenizer, *(args.task_folder or [])])
    tasks = [name for name in (args.tasks or "").split(",") if name]
    rows = [] if published is None else published.of_tasks(tasks)
    parts = [_part_of(row, settings) for row in rows]
    work = HarnessWork(
        parts=parts or [HarnessPart(tasks, settings, protocol_of(args), args.shots, args.max_new_tokens)],
        folders=args.task_folder or [],
        greedy=args.greedy,
        chat=args.chat_template if published is None else published.chat_template,
        template=args.template,
        one_turn=args.one_turn,
        limit=args.limit,
        keep_samples=args.output is not None,
        resume=args.resume,
        output=None if args.output is None else str(Path(args.output).absolute()),
    )
    result = run_spread(SpreadJob(args.checkpoint, settings.layout, work, settings.fp8), args.local)
    if result is None:
        return 0
    found = result["parts"]
    if published is not None:
        return _compare(published, rows, found, args)
    _write(args.output, found[0])
    _show(found[0])
    if args.json:
        emit_json({name: found[0][name] for name in ("protocol", "results")})
    return 0


def _part_of(row: PublishedRow, settings: Settings) -> HarnessPart:
    """A row of published figures as it was measured: LLaDA's own sampler, one token a step."""
    protocol = LikelihoodProtocol(samples=row.samples, stratum=row.stratum, guidance=row.guidance, seed=settings.seed)
    length = row.block_length or row.new_tokens
    own = replace(settings, preset="llada", block_length=length, guidance=row.guidance)
    return HarnessPart([row.task], own, protocol, row.shots, row.new_tokens)


def _check(args: argparse.Namespace, chat: bool) -> None:
    """Refuse what would only show after the model is loaded, or not at all. Raises ConfigError."""
    if not args.tasks and args.published is None:
        raise ConfigError("what is asked? Give --tasks A,B or --published NAME")
    values = [(name, getattr(args, name)) for name in _OWN]
    given = [f"--{name.replace('_', '-')}" for name, value in values if value is not None and value is not False]
    given += [text for text in args.overrides if not text.startswith("layout.")]
    if args.published is not None and given:
        raise ConfigError(f"{given[0]}: --published NAME has its own settings; give --tasks A,B for yours")
    for name, least in (("shots", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")
    for folder in args.task_folder or []:
        if not Path(folder).is_dir():
            raise ConfigError(f"--task-folder {folder}: there is no such folder")
    for name, value in (("--template", args.template), ("--one-turn", args.one_turn)):
        if value and not (args.chat_template or chat):
            raise ConfigError(f"{name} belongs to --chat-template")
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no such folder")


def _compare(
    published: PublishedFigures, rows: Sequence[PublishedRow], found: Sequence[dict[str, Any]], args: argparse.Namespace
) -> int:
    """Print every row beside what was measured. 1 unless each of them is accepted."""
    verdicts = [
        Verdict.of(row, {**part["results"], **(part.get("groups") or {})}.get(row.task, {}), whole=args.limit is None)
        for row, part in zip(rows, found, strict=True)
    ]
    record = {"model": published.model, "source": published.source, "rows": [each.record() for each in verdicts]}
    _write(args.output, {**record, "parts": list(found)})
    print("\n".join(map(str, verdicts)))
    print(f"published: {published.model}, {published.source}")
    if args.limit is not None:
        print(f"measured on the first {args.limit} documents of each task only, which decides nothing")
    if args.json:
        emit_json(record)
    return 0 if all(each.accepted for each in verdicts) else 1


def _write(output: str | None, values: dict[str, Any]) -> None:
    if output is not None:
        Path(output).write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _show(result: dict[str, Any]) -> None:
    """Every metric with its error, under the protocol."""
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, way = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not way:
                continue
            error = metrics.get(f"{metric}_stderr,{way}")
            known = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            print(f"{task:<28} {metric:<20} {way:<18} {value:.4f}{known}")
    facts = result["protocol"]
    print(f"likelihood: {result['line']}")
    chosen = facts["sampling"]
    method = {name: chosen[name] for name in ("preset", "schedule", "block_length", "temperature", "guidance", "seed")}
    print(f"sampling: {', '.join(f'{name} {value}' for name, value in method.items())}, shots {facts['shots']}")
    if facts["shortened"]:
        message(f"{facts['shortened']} prompts lost their beginning, which did not fit the model")
