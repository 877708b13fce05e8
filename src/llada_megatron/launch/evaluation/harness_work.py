"""What each rank does for `llada eval harness`: rank 0 runs lm_eval, the others serve the model that it asks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.launch.files import replace
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.launch.evaluation.harness_model import HarnessModel
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.evaluation.served_model import ServedModel
    from llada_megatron.parallel.sampling.chat_template import ChatTemplate


@dataclass(frozen=True)
class HarnessPart:
    """Tasks that are measured alike: one call of lm_eval."""

    tasks: Sequence[str]
    settings: Settings
    likelihood: LikelihoodProtocol
    shots: int | None = None
    """Examples before a question; None = the task's."""
    length: int | None = None
    """Tokens of an answer; None = the task's."""


@dataclass(frozen=True)
class HarnessWork:
    """The parts of an evaluation, and what they have in common."""

    parts: Sequence[HarnessPart]
    folders: Sequence[str]
    greedy: bool
    chat: bool
    template: str | None
    one_turn: bool
    limit: int | None
    keep_samples: bool
    resume: str | None
    """Where answers are kept. lm_eval knows them by their request alone, so there is a file for each protocol."""
    output: str | None = None
    """A file for the parts that are done, written after each of several."""

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """`parts`, the results of lm_eval for each, on rank 0, an empty dictionary on others."""
        import torch

        from llada_megatron.parallel.evaluation.served_model import ServedModel

        served = ServedModel(loaded, self.parts[0].likelihood, self.parts[0].settings)
        if torch.distributed.get_rank() != 0:
            served.follow()
            return {}
        try:
            return {"parts": self._evaluated(served)}
        finally:
            served.release()

    def _evaluated(self, served: ServedModel) -> list[dict[str, Any]]:
        from llada_megatron.parallel.sampling.chat_template import PLAIN_TEXT_NOTE, find_template, has_template

        if not self.chat and has_template(served.tokenizer):
            message(f"{PLAIN_TEXT_NOTE}; --chat-template puts questions into it")
        chat = find_template(served.tokenizer, self.template) if self.chat else None
        manager = self._manager()
        self._load(manager)
        found: list[dict[str, Any]] = []
        for number, part in enumerate(self.parts, start=1):
            if len(self.parts) > 1:
                message(f"{number} of {len(self.parts)}: {', '.join(part.tasks)}")
                served.use(part.likelihood, part.settings)
            found.append(self._of_part(served, part, chat, manager))
            if self.output is not None and len(self.parts) > 1:
                replace(Path(self.output), json.dumps({"parts": found}, indent=1) + "\n")
        return found

    def _manager(self) -> Any:
        """The task files of the folders, and of lm_eval where those do not have all tasks.

        Raises:
            ConfigError: a task is in neither, or a file is not one of a task.
        """
        import lm_eval
        import yaml
        from lm_eval.tasks import TaskManager

        folders, wanted = list(self.folders) or None, {task for part in self.parts for task in part.tasks}
        try:
            manager = TaskManager(include_path=folders, include_defaults=False)
            if not wanted <= set(manager.all_tasks):  # reading thousands of task files takes seconds
                manager = TaskManager(include_path=folders)
        except yaml.YAMLError as error:
            raise ConfigError(f"--task-folder: not YAML: {' '.join(str(error).split())}") from error
        unknown = sorted(wanted - set(manager.all_tasks))
        if unknown:
            raise ConfigError(f"--tasks {','.join(unknown)}: lm_eval {lm_eval.__version__} has no such task or group")
        return manager

    def _load(self, manager: Any) -> None:
        """Read every task once, so that one which cannot be read costs nothing.

        Raises:
            ConfigError: a task needs packages that are not installed.
            DataError: a data set of a task is not there, or cannot be read.
        """
        for task in dict.fromkeys(task for part in self.parts for task in part.tasks):
            with _told_in_one_line([task]):
                try:
                    manager.load([task])
                except AssertionError as error:  # so some say that a package has another version
                    raise ImportError(str(error) or "AssertionError") from error

    def _of_part(
        self, served: ServedModel, part: HarnessPart, chat: ChatTemplate | None, manager: Any
    ) -> dict[str, Any]:
        import lm_eval

        from llada_megatron.launch.evaluation.harness_model import HarnessModel

        model = HarnessModel(served, max_new_tokens=part.length, greedy=self.greedy, template=chat)
        protocol = self._protocol(served, part, chat)
        found = self._results(model, part, manager, protocol)
        protocol |= {
            "shots": {name: found.get("n-shot", {}).get(name) for name in found["results"]},
            "lm_eval": lm_eval.__version__,
            "shortened": model.shortened,
        }
        return json.loads(json.dumps({"protocol": protocol, "line": str(served.protocol), **found}, default=str))

    def _results(
        self, model: HarnessModel, part: HarnessPart, manager: Any, protocol: dict[str, Any]
    ) -> dict[str, Any]:
        """What lm_eval finds.

        Raises:
            ConfigError: a task runs what the model writes as a program, or needs packages that are not installed.
            DataError: a data set of a task is not there, or cannot be read.
        """
        import lm_eval

        kept = hashlib.sha256(json.dumps(protocol, default=str).encode()).hexdigest()[:12]
        with _told_in_one_line(part.tasks):
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(part.tasks),
                task_manager=manager,
                num_fewshot=part.shots,
                limit=self.limit,
                log_samples=self.keep_samples,
                use_cache=None if self.resume is None else f"{self.resume}-{kept}",
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat and not self.one_turn,
            )
        if found is None:
            raise ConfigError("lm_eval gave no results")
        return found

    def _protocol(self, served: ServedModel, part: HarnessPart, chat: ChatTemplate | None) -> dict[str, Any]:
        """All that an answer depends on beside its request."""
        unread = ("layout", "batch_size", "cuda_graphs", "checkpoint", "tokenizer")
        return {
            "likelihood": served.protocol.record(),
            "sampling": {name: value for name, value in asdict(part.settings).items() if name not in unread},
            "max_new_tokens": part.length,
            "greedy": self.greedy,
            "chat_template": None if chat is None else hashlib.sha256(chat.template.encode()).hexdigest(),
            "one_turn": self.one_turn,
            "checkpoint": str(served.loaded.path.resolve()),
            "tokenizer": served.tokenizer.sha256,
            "precision": str(served.loaded.model.config.params_dtype).removeprefix("torch."),
        }


@contextlib.contextmanager
def _told_in_one_line(tasks: Sequence[str]) -> Iterator[None]:
    """Say in one line what keeps lm_eval from these tasks. Raises ConfigError and DataError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise ConfigError(
            f"--tasks {','.join(tasks)}: one runs programs that the model writes, which is never done here"
        ) from error
    except ImportError as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"--tasks {','.join(tasks)}: a package is missing, of mathematics pip install 'lm_eval[math]': {why}"
        ) from error
    except (OSError, DatasetsError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"data of {', '.join(tasks)} cannot be read: {why}") from error
