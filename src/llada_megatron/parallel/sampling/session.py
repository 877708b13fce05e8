"""Sampling prompts with a loaded model: the path that all interfaces share, on one rank or on many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError, DataError, LladaError
from llada_megatron.llada_moe.objectives import checkpoint_objective, trained_objective
from llada_megatron.llada_moe.sampling.editors import never_written, trained_for_editing
from llada_megatron.llada_moe.sampling.presets import choose
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, RandomSteps, SelfSpeculation
from llada_megatron.llada_moe.sampling.token_buffer import stretches
from llada_megatron.parallel import device
from llada_megatron.parallel.sampling.checkpoint_tokenizer import checkpoint_tokenizer, ids_without_token
from llada_megatron.parallel.sampling.cuda_graphs import GraphCounts, obstacle_to, recorder_of
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.parallel.sampling.prompts import Gap, Prompt
from llada_megatron.parallel.sampling.requests import RequestBuilder, longest_first, steps_note
from llada_megatron.parallel.sampling.results import Result, text_after
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.llada_moe.sampling.loop import Finished, Method, Step
    from llada_megatron.llada_moe.sampling.token_buffer import Request
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

Share = Callable[[list["Request"]], list["Request"]]
"""Selects from all requests those that this replica samples."""


@dataclass(frozen=True)
class StepEvent:
    """One step, and the results of the prompts that it finished."""

    step: Step
    results: list[Result]


@dataclass(frozen=True)
class Job:
    """A prompt and its request."""

    prompt: Prompt
    request: Request


@dataclass
class _Clock:
    """Measures how long each sequence runs, from its first pass to its last."""

    now: float = field(default_factory=time.perf_counter)
    began: dict[int, float] = field(default_factory=dict)

    def tick(self, streams: list[int]) -> None:
        """Note that a step of these sequences has ended."""
        for stream in streams:
            self.began.setdefault(stream, self.now)
        self.now = time.perf_counter()

    def taken(self, stream: int) -> float:
        """Seconds that a finished sequence took."""
        return self.now - self.began.pop(stream)


class Session:
    """A loaded model with settings, ready for prompts. Every rank of its world makes one and calls it alike."""

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        """Raises ConfigError for a method or CUDA graphs that do not fit the model, DataError for another model's
        tokenizer."""
        run = loaded.run
        if not checkpoint_objective(run, loaded.metadata).fills_masks:
            raise ConfigError(f"{loaded.path} is an autoregressive model; sampling fills masks of a diffusion model")
        self.loaded, self.settings = loaded, settings
        self._graph_obstacle = obstacle_to(settings.cuda_graphs, loaded.model)
        self._recorder = recorder_of(settings.cuda_graphs, loaded.model)
        self._graphs = GraphCounts()
        self.choice = choose(
            settings.preset,
            settings.schedule,
            settings.cache,
            settings.editor,
            settings.overrides,
            trained_objective(run, loaded.metadata),
            run.model,
            block_length=settings.block_length,
            trained_for_editing=settings.trained_for_editing or trained_for_editing(run.objective),
        )
        self.tokenizer, self._missing = _tokenizer(loaded, settings.tokenizer)
        self.request_builder = RequestBuilder(
            run.model,
            self.tokenizer,
            settings.max_new_tokens,
            self.choice.block_length,
            self.choice.grid,
            continues_only=isinstance(self.choice.schedule, SelfSpeculation),
        )

    def jobs(self, prompts: Sequence[Prompt]) -> list[Job]:
        """The jobs of prompts. Raises ConfigError or DataError for a prompt that cannot be sampled."""
        return self.accepted(prompts, tolerant=False)[0]

    def accepted(self, prompts: Sequence[Prompt], tolerant: bool) -> tuple[list[Job], list[str]]:
        """The jobs of prompts, and a message for each prompt that cannot be sampled.

        If not `tolerant`, such a prompt raises ConfigError or DataError as in `jobs`; otherwise it is skipped.
        """
        if any(prompt.textual for prompt in prompts):
            self.require_tokenizer()
        jobs, refused = [], []
        for prompt in prompts:
            try:
                jobs.append(Job(prompt, self.request_builder.build(prompt)))
            except LladaError as error:
                if not tolerant:
                    raise
                refused.append(str(error))
        return jobs, refused

    def run(
        self, jobs: Sequence[Job], share: Share = lambda requests: requests, seed: int | None = None
    ) -> Iterator[StepEvent]:
        """Sample the jobs of this replica, the longest first.

        Collective: on several ranks all of them must consume all events. Continuations come first and infillings after
        them, because different tokens are excluded for them.

        Args:
            jobs: the jobs of all replicas.
            share: selects those of this replica.
            seed: seed of the random draws; None = that of the settings.
        """
        seed = self.settings.seed if seed is None else seed
        self._note_uneven_steps(jobs)
        for infilling in (False, True):
            chosen = {job.request.stream: job for job in jobs if job.prompt.infilling == infilling}
            if not chosen:
                continue
            method, batch_size = self._method(infilling, seed), self.settings.batch_size
            generator = SequenceGenerator(self.loaded, method, batch_size, recorder=self._recorder)
            clock = _Clock()
            for step in generator.steps(share(longest_first([job.request for job in chosen.values()]))):
                clock.tick(step.block.stream.tolist())
                done = [self._result(chosen[one.stream], one, clock.taken(one.stream)) for one in step.finished]
                yield StepEvent(step, done)
            self._graphs += generator.report.graphs

    @property
    def graphs_note(self) -> str | None:
        """A line for the user on the CUDA graphs so far; None where there is no GPU, or where they are not wanted."""
        if self.settings.cuda_graphs == "never" or not device.cuda_available():
            return None
        if self._graph_obstacle is not None:
            return f"passes run without CUDA graphs: {self._graph_obstacle}"
        return str(self._graphs)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError where there is none, with the reason."""
        if self.tokenizer is None:
            raise DataError(self._missing)
        return self.tokenizer

    def _method(self, infilling: bool, seed: int) -> Method:
        """The method for infillings or continuations: an end of text is excluded in gaps, and ends a continuation."""
        model = self.loaded.run.model
        excluded = [*never_written(model, self.choice.editor)]
        if self.tokenizer is not None:
            excluded += ids_without_token(self.tokenizer, model.vocab_size)
        if infilling:
            excluded.append(model.eos_token_id)
        return self.choice.method(
            excluded=sorted(set(excluded)),
            temperature=self.settings.temperature,
            guidance=self.settings.guidance,
            seed=seed,
            stop_id=None if infilling else model.eos_token_id,
        )

    def _note_uneven_steps(self, jobs: Sequence[Job]) -> None:
        """Say so where the given number of steps cannot be divided evenly."""
        schedule = self.choice.schedule
        if not isinstance(schedule, FixedSteps | RandomSteps) or (steps := schedule.steps) is None:
            return
        notes = [note for job in jobs if (note := steps_note(job.request, steps))]
        if notes:
            others = len(set(notes)) - 1
            message(notes[0] + (f" (and the like for {others} other lengths)" if others else ""))

    def _result(self, job: Job, finished: Finished, seconds: float) -> Result:
        """The result of a finished sequence, up to the first end-of-text token that was sampled."""
        stop = self.loaded.run.model.eos_token_id
        positions = enumerate(zip(finished.tokens, finished.given, strict=True))
        end = next((i for i, (token, given) in positions if token == stop and not given), None)
        tokens, given = finished.tokens[:end], finished.given[:end]
        gaps = stretches(~torch.tensor(given, dtype=torch.bool))
        text, new = self._texts(job.prompt, tokens, gaps)
        return Result(
            number=job.prompt.number,
            id=job.prompt.id,
            text=text,
            new=new,
            tokens=tokens,
            written=[tokens[start:stop] for start, stop in gaps],
            ended=end is not None,
            forwards=finished.passes,
            positions=finished.positions_run,
            seconds=seconds,
        )

    def _texts(self, prompt: Prompt, tokens: list[int], gaps: list[tuple[int, int]]) -> tuple[str | None, str | None]:
        """The whole text and the sampled text; given texts are returned unchanged, not decoded from tokens."""
        if self.tokenizer is None:
            return None, None
        fillings = [text_after(self.tokenizer, tokens[:start], tokens[start:end]) for start, end in gaps]
        given = [piece for piece in prompt.pieces if not isinstance(piece, Gap)]
        if not all(isinstance(piece, str) for piece in given):
            return self.tokenizer.decode(tokens), "\n".join(fillings)
        if not prompt.infilling:
            return "".join([*given, *fillings]), "\n".join(fillings)  # type: ignore[list-item]
        return _filled(prompt, fillings), "\n".join(fillings)


def _filled(prompt: Prompt, fillings: list[str]) -> str:
    """A text with its gaps filled; adjacent gaps have one filling together."""
    waiting, parts, before = iter(fillings), [], False
    for piece in prompt.pieces:
        if isinstance(piece, Gap):
            parts.append("" if before else next(waiting, ""))
        else:
            parts.append(str(piece))
        before = isinstance(piece, Gap)
    return "".join(parts)


def _tokenizer(loaded: LoadedModel, path: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and the reason why there is none.

    Raises:
        DataError: there is one, and it cannot be used.
    """
    from llada_megatron.parallel.checkpoint.search import tokenizer_place

    place = path or tokenizer_place(loaded.path, loaded.metadata)
    try:
        return checkpoint_tokenizer(loaded, path), ""
    except DataError as error:
        if path is not None or (place is not None and place.exists()):
            raise
        return None, str(error)
