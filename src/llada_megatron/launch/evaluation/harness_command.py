"""`llada eval harness`: tasks of lm-evaluation-harness with a checkpoint, on one process or the ranks of a layout."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json, message
from llada_megatron.launch.evaluation.protocol_options import add_protocol, protocol_of
from llada_megatron.launch.evaluation.spread_job import SpreadJob, run_spread
from llada_megatron.launch.sampling.options import add_method, add_model, settings_of
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.overwriting import refuse_overwriting
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.evaluation.served_model import ServedModel
    from llada_megatron.parallel.sampling.chat_template import ChatTemplate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval harness`."""
    add_model(parser)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--tasks", required=True, metavar="A,B", help="tasks and groups of lm_eval, by name")
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
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="all results of lm_eval and the protocol, as JSON")
    output.add_argument("--resume", metavar="FILE", help="keep answers beside FILE; the same command goes on there")
    output.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")


@dataclass(frozen=True)
class HarnessWork:
    """The work of each rank: rank 0 runs lm_eval, the others serve it."""

    tasks: Sequence[str]
    folders: Sequence[str]
    settings: Settings
    likelihood: LikelihoodProtocol
    greedy: bool
    length: int | None
    chat: bool
    template: str | None
    resume: str | None
    """Where answers are kept. lm_eval knows them by their request alone, so there is a file for each protocol."""
    evaluation: dict[str, Any]
    """Further arguments of `lm_eval.simple_evaluate`."""

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """The results of lm_eval on rank 0, an empty dictionary on others."""
        import torch

        from llada_megatron.parallel.evaluation.served_model import ServedModel

        served = ServedModel(loaded, self.likelihood, self.settings)
        if torch.distributed.get_rank() != 0:
            served.follow()
            return {}
        try:
            return self._evaluated(served)
        finally:
            served.release()

    def _evaluated(self, served: ServedModel) -> dict[str, Any]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from llada_megatron.launch.evaluation.harness_model import HarnessModel
        from llada_megatron.parallel.sampling.chat_template import PLAIN_TEXT_NOTE, find_template, has_template

        if not self.chat and has_template(served.tokenizer):
            message(f"{PLAIN_TEXT_NOTE}; --chat-template puts questions into it")
        manager = TaskManager(include_path=list(self.folders) or None, include_defaults=False)
        if not set(self.tasks) <= set(manager.all_tasks):  # reading thousands of task files takes seconds
            manager = TaskManager(include_path=list(self.folders) or None)
        unknown = [name for name in self.tasks if name not in manager.all_tasks]
        if unknown:
            raise ConfigError(f"--tasks {','.join(unknown)}: lm_eval {lm_eval.__version__} has no such task or group")
        chat = find_template(served.tokenizer, self.template) if self.chat else None
        model = HarnessModel(served, max_new_tokens=self.length, greedy=self.greedy, template=chat)
        protocol = self._protocol(served, chat)
        kept = hashlib.sha256(json.dumps(protocol, default=str).encode()).hexdigest()[:12]
        found = self._results(
            model=model,
            use_cache=None if self.resume is None else f"{self.resume}-{kept}",
            task_manager=manager,
            apply_chat_template=self.chat,
        )
        protocol |= {
            "shots": {name: found.get("n-shot", {}).get(name) for name in found["results"]},
            "lm_eval": lm_eval.__version__,
            "shortened": model.shortened,
        }
        return json.loads(json.dumps({"protocol": protocol, "line": str(served.protocol), **found}, default=str))

    def _results(self, **arguments: Any) -> dict[str, Any]:
        """What lm_eval finds.

        Raises:
            ConfigError: a task runs what the model writes as a program.
            DataError: a data set of a task is not there, or cannot be read.
        """
        import lm_eval
        from datasets.exceptions import DatasetsError

        try:
            found = lm_eval.simple_evaluate(tasks=list(self.tasks), **arguments, **self.evaluation)
        except ValueError as error:
            if "marked as unsafe" not in str(error):
                raise
            raise ConfigError(
                f"--tasks: one runs programs that the model writes, which is never done here ({error})"
            ) from error
        except (OSError, DatasetsError) as error:
            why = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"data of {', '.join(self.tasks)} cannot be read: {why}") from error
        if found is None:
            raise ConfigError("lm_eval gave no results")
        return found

    def _protocol(self, served: ServedModel, chat: ChatTemplate | None) -> dict[str, Any]:
        """All that an answer depends on beside its request."""
        unread = ("layout", "batch_size", "cuda_graphs", "checkpoint", "tokenizer")
        return {
            "likelihood": served.protocol.record(),
            "sampling": {name: value for name, value in asdict(self.settings).items() if name not in unread},
            "max_new_tokens": self.length,
            "greedy": self.greedy,
            "chat_template": None if chat is None else hashlib.sha256(chat.template.encode()).hexdigest(),
            "checkpoint": str(served.loaded.path.resolve()),
            "tokenizer": served.tokenizer.sha256,
            "precision": str(served.loaded.model.config.params_dtype).removeprefix("torch."),
        }


def run(args: argparse.Namespace) -> int:
    """Evaluate; raises ConfigError, DataError or CheckpointError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval is not installed: pip install 'llada-megatron[eval]'")
    _check(args)
    settings = settings_of(args, default_tokens=256)
    if args.output is not None:
        refuse_overwriting("--output", [Path(args.output)], [args.tokenizer, *(args.task_folder or [])])
    evaluation = {
        "num_fewshot": args.shots,
        "limit": args.limit,
        "fewshot_as_multiturn": args.chat_template and not args.one_turn,
        "log_samples": args.output is not None,
    }
    work = HarnessWork(
        tasks=[name for name in args.tasks.split(",") if name],
        folders=args.task_folder or [],
        settings=settings,
        likelihood=protocol_of(args),
        greedy=args.greedy,
        length=args.max_new_tokens,
        chat=args.chat_template,
        template=args.template,
        resume=args.resume,
        evaluation=evaluation,
    )
    result = run_spread(SpreadJob(args.checkpoint, settings.layout, work), args.local)
    if result is None:
        return 0
    if args.output is not None:
        Path(args.output).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    _show(result)
    if args.json:
        emit_json({name: result[name] for name in ("protocol", "results")})
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what would only show after the model is loaded, or not at all. Raises ConfigError."""
    for name, least in (("shots", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")
    for folder in args.task_folder or []:
        if not Path(folder).is_dir():
            raise ConfigError(f"--task-folder {folder}: there is no such folder")
    for name, given in (("--template", args.template), ("--one-turn", args.one_turn)):
        if given and not args.chat_template:
            raise ConfigError(f"{name} belongs to --chat-template")
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no such folder")


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
