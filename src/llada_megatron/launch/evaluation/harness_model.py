"""A model for lm-evaluation-harness (the package `lm_eval`), served by one process or by the ranks of a layout.

The class is registered under the name `llada` when this module is imported; `llada eval harness` does so. lm_eval
itself runs in rank 0 only, with all requests, and the served model shares them out.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from llada_megatron.console import message
from llada_megatron.llada_moe.data.tokenizer import encode_behind
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import Pair, rolling
from llada_megatron.llada_moe.evaluation.scored_lines import split_pair
from llada_megatron.parallel.sampling.chat_template import ChatTemplate, find_template
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from llada_megatron.parallel.evaluation.served_model import ServedModel
    from llada_megatron.parallel.sampling.results import Result

TOGETHER = 32
"""Requests that are answered before their answers are kept, for a run that goes on after an interruption."""


@register_model("llada")
class HarnessModel(LM):
    """Any checkpoint of this project, as lm_eval asks for it."""

    def __init__(
        self,
        served: ServedModel | None = None,
        *,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        preset: str | None = None,
        estimator: str | None = None,
        samples: int = 128,
        stratum: int = 8,
        guidance: float = 0.0,
        seed: int = 0,
        max_new_tokens: int | None = None,
        greedy: bool = False,
        template: ChatTemplate | str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Serve a loaded model, or open a checkpoint in this process (`lm_eval --model llada --model_args …`).

        Args:
            served: the model; then the next settings are its own, down to `seed`.
            checkpoint: a run's output directory or a step directory.
            tokenizer: where the checkpoint's tokenizer is now, if it was moved.
            preset: a published sampling method.
            estimator: see `LikelihoodProtocol`; None = the bound, or next-token of a model that learnt it.
            samples: see `LikelihoodProtocol`, as `stratum`, `guidance` and `seed`.
            stratum: see there.
            guidance: of likelihood and of sampling.
            seed: of the masks and of sampling.
            max_new_tokens: of every text, whatever a task says; None = what the task says, else 256.
            greedy: compute `is_greedy`, which takes a forward pass for each token of every answer.
            template: for conversations; a name or file as `find_template` takes it, None = the checkpoint's own.
            batch_size: texts that are written together; "auto" is the default of 8.
            device: ignored: the device is that of this process.
            max_batch_size: ignored.
        """
        super().__init__()
        self._open = contextlib.ExitStack()
        if served is None:
            served = self._opened(
                checkpoint, tokenizer, preset, estimator, (samples, stratum, guidance, seed), batch_size
            )
        self.served, self._length, self._greedy = served, max_new_tokens, greedy
        self._rendered: dict[str, list[int]] = {}
        self._wanted = None if isinstance(template, ChatTemplate) else template
        self._template = template if isinstance(template, ChatTemplate) else None
        self.shortened = 0
        """Prompts and contexts whose beginning did not fit the model."""

    def _opened(
        self,
        checkpoint: str | None,
        tokenizer: str | None,
        preset: str | None,
        estimator: str | None,
        drawn: tuple[int, int, float, int],
        batch_size: int | str | None,
    ) -> ServedModel:
        if checkpoint is None:
            raise ConfigError("which checkpoint? Give --model_args checkpoint=PATH")
        from llada_megatron.parallel import device

        device.install()
        from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
        from llada_megatron.parallel.evaluation.served_model import ServedModel

        samples, stratum, guidance, seed = drawn
        size = int(batch_size) if str(batch_size or "").isdecimal() else 8
        settings = Settings(
            checkpoint=str(checkpoint),
            tokenizer=tokenizer,
            preset=preset,
            guidance=guidance,
            seed=seed,
            batch_size=size,
        )
        loaded = self._open.enter_context(open_checkpoint(checkpoint))
        protocol = LikelihoodProtocol(estimator, int(samples), int(stratum), float(guidance), int(seed))  # type: ignore[arg-type]
        return ServedModel(loaded, protocol, settings)

    # what lm_eval asks for

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation; without `greedy` the second value is always False."""
        if not self._greedy:
            message("is_greedy is not computed, and False: a metric that reads it (lambada's acc) needs --greedy")
        found: list[tuple[float, bool]] = []
        for some in _chunks(requests):
            pairs = [self._pair(request) for request in some]
            estimates = self.served.log_likelihoods(pairs)
            greedy = self.served.greedy(pairs) if self._greedy else [False] * len(pairs)
            answers = [(each.nats, same) for each, same in zip(estimates, greedy, strict=True)]
            found += self._kept("loglikelihood", some, answers)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that fit the model; each token counts once."""
        found: list[float] = []
        prefix = self.served.model.eos_token_id if self.served.kind.predicts_next else None
        for some in _chunks(requests):
            windows = []
            for request in some:
                (text,) = request.args
                ids = self.served.tokenizer.encode(text)
                windows.append(rolling(ids, self.served.model.max_sequence_length, prefix, _digest(text)))
            estimates = iter(self.served.log_likelihoods([pair for each in windows for pair in each]))
            answers = [sum(next(estimates).nats for _ in each) for each in windows]
            found += self._kept("loglikelihood_rolling", some, answers)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the first end of text that was written and at the first of the task's stop texts."""
        found: list[str] = []
        asked: Counter[str] = Counter()
        for some in _chunks(requests):
            prompts = []
            for request in some:
                prompts.append(self._prompt(request, asked[request.args[0]]))
                asked[request.args[0]] += 1
            results = self.served.generate(prompts)
            answers = [cut_at(self._answer(result), _until(r)) for r, result in zip(some, results, strict=True)]
            found += self._kept("generate_until", some, answers)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Its token ids are kept, since no text of a message may give a special token.

        Without `add_generation_prompt` the last message is the beginning of the answer, which the task wrote.
        """
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        template = self._chat_template()
        text, parts = template.parts(chat_history if add_generation_prompt else chat_history[:-1])
        ids = template.ids_of(text, parts)
        self._rendered[text + begun] = ids + encode_behind(self.served.tokenizer.encode, begun)
        return text + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja template, which lm_eval writes into its results."""
        return self._chat_template().template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What tells this model's requests apart in lm_eval's cache of requests."""
        return self.served.tokenizer.sha256

    def close(self) -> None:
        """Leave the process groups of a checkpoint that this object opened."""
        self._open.close()

    # requests

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = find_template(self.served.tokenizer, self._wanted)
        return self._template

    def _pair(self, request: Instance) -> Pair:
        context, continuation = request.args
        known = self._ids(context)
        if known is None:
            before, after = split_pair(context, continuation, self.served.tokenizer)
        else:
            before, after = tuple(known), tuple(encode_behind(self.served.tokenizer.encode, continuation))
        if not before and self.served.kind.predicts_next:
            before = (self.served.model.eos_token_id,)
        name = (request.task_name, request.doc_id) if request.doc_id is not None else context
        pair = Pair(before, after, _digest(name), request.idx)
        fitted = pair.fitted(self.served.model.max_sequence_length)
        self.shortened += len(fitted.context) < len(pair.context)
        return fitted

    def _ids(self, context: str) -> list[int] | None:
        """Token ids of a conversation, and of what a task puts behind it; None for ordinary text."""
        if context in self._rendered:
            return self._rendered[context]
        begun = [text for text in self._rendered if context.startswith(text)]
        if not begun:
            return None
        longest = max(begun, key=len)
        return self._rendered[longest] + encode_behind(self.served.tokenizer.encode, context[len(longest) :])

    def _prompt(self, request: Instance, times: int) -> Prompt:
        """The prompt of a request that was asked so many `times` before.

        Its number, which draws depend on, comes from its text: it is the same whichever requests are left to do.
        """
        context, arguments = request.args
        temperature = arguments.get("temperature", 0.0) if arguments.get("do_sample", False) else 0.0
        if temperature != self.served.settings.temperature and arguments.get("do_sample", False):
            raise ConfigError(
                f"task {request.task_name} draws at temperature {temperature:g}: say --temperature {temperature:g}"
            )
        new = self._length or int(arguments.get("max_gen_toks", 256))
        ids = self._ids(context)
        if ids is None:
            ids = self.served.tokenizer.encode(context)
        room = self.served.room(new)
        self.shortened += len(ids) > room
        kept = ids[max(0, len(ids) - room) :]
        return replace(Prompt.of(kept, 1 + _digest((context, times))), max_new_tokens=new)

    def _answer(self, result: Result) -> str:
        """What was written before an end of text, and before the end of the turn where there is a chat template."""
        written = [token for run in result.written for token in run]
        end = None if self._template is None else self._template.end_of_turn
        if end in written:
            return self.served.tokenizer.decode(written[: written.index(end)])
        return result.new or ""

    def _kept(self, kind: str, requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
        """The answers, which lm_eval has now written to its cache where it has one."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _until(request: Instance) -> list[str]:
    until = request.args[1].get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _chunks(requests: Sequence[Instance]) -> Iterator[Sequence[Instance]]:
    for start in range(0, len(requests), TOGETHER):
        yield requests[start : start + TOGETHER]


def _digest(name: object) -> int:
    """A number of 40 bits that stands for a name."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:5], "big")
