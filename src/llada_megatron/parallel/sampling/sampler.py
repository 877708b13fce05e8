"""Sampling from Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.results import Result, text_after
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.sampling.session import Job, Session, StepEvent

AnyPrompt = str | Sequence[int] | Prompt


@dataclass(frozen=True)
class WrittenToken:
    """A position that a step changed."""

    prompt: int
    """Number of the prompt, from 1."""
    position: int
    """In the sequence, its prompt included."""
    token: int | None
    """None = it is masked again."""
    piece: str | None
    """The token's text; None without a tokenizer. A part of a character reads as U+FFFD."""
    confidence: float
    """Probability that the model gave it in this step."""


@dataclass(frozen=True)
class SampledStep:
    """What one forward pass wrote."""

    number: int
    """From 1."""
    written: list[WrittenToken]
    finished: list[Result]
    """Sequences that it completed."""


class Sampler:
    """A checkpoint that writes.

    >>> with Sampler.open("runs/demo", schedule="threshold", block_length=32) as sampler:
    ...     for result in sampler.generate(["def main(", "class "], max_new_tokens=48):
    ...         print(result.text)
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        """Of a model that is loaded: every rank of its world makes one and calls it alike."""
        from llada_megatron.parallel.sampling.session import Session

        self._session: Session = Session(loaded, settings)

    @classmethod
    @contextmanager
    def open(
        cls,
        checkpoint: str | Path,
        *,
        tokenizer: str | Path | None = None,
        preset: str | None = None,
        schedule: str | None = None,
        cache: str | None = None,
        editor: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        guidance: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        trained_for_editing: bool = False,
    ) -> Iterator[Sampler]:
        """Load a checkpoint in this process, which takes part in no other process group meanwhile.

        Args:
            checkpoint: a run's output directory (its newest whole checkpoint) or a step directory.
            tokenizer: where the checkpoint's tokenizer is now, if it was moved.
            preset: a published method (`llada sample --list-presets`).
            schedule: which masks are committed in a step, in the place of the preset's rule.
            cache: whose keys are kept.
            editor: what may change that was written.
            overrides: settings of these, such as {"schedule.threshold": 0.8}.
            block_length: tokens that are written together, from left to right; None = the preset's, or all.
            temperature: 0 = the likeliest token.
            guidance: classifier-free guidance, 0 = off.
            seed: of the draws.
            batch_size: sequences that run together.
            max_new_tokens: of a continuation.
            trained_for_editing: the user's word for a model whose configuration does not say so.

        Raises:
            ConfigError: a method that does not exist, or does not fit the model.
            CheckpointError: there is no whole checkpoint.
            DataError: the tokenizer is another one.
        """
        settings = Settings(
            checkpoint=str(checkpoint),
            tokenizer=None if tokenizer is None else str(tokenizer),
            preset=preset,
            schedule=schedule,
            cache=cache,
            editor=editor,
            overrides={key: _as_text(value) for key, value in (overrides or {}).items()},
            block_length=block_length,
            temperature=temperature,
            guidance=guidance,
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            trained_for_editing=trained_for_editing,
        )
        with open_sampler(settings) as sampler:
            yield sampler

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, None where it has none: then prompts are token ids."""
        return self._session.tokenizer

    @property
    def session(self) -> Session:
        """What is below: for the command line."""
        return self._session

    def generate(
        self,
        prompts: Iterable[AnyPrompt] | AnyPrompt,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[Result]:
        """The results of the prompts, in their order; one prompt is a list of one.

        Draws depend on the seed and on a prompt's number in the call, not on what it runs beside: the same call gives
        the same tokens, and rollouts of a training give another seed each time.

        Args:
            prompts: texts or token ids, which are continued; `Prompt.with_gaps`, whose gaps are filled;
                `Prompt.edited`.
            max_new_tokens: of continuations; None = as in `open`.
            seed: of the draws; None = as in `open`.

        Raises:
            ConfigError: a prompt that is too long, or has nothing to write.
            DataError: a text for a checkpoint without a tokenizer.
        """
        jobs = self.jobs(prompts, max_new_tokens)
        results = [result for happened in self._session.run(jobs, seed=seed) for result in happened.results]
        return sorted(results, key=lambda result: result.number)

    def steps(
        self,
        prompts: Iterable[AnyPrompt] | AnyPrompt,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> Iterator[SampledStep]:
        """What each step writes, while it is written; see `generate`."""
        yield from self.steps_of(self.jobs(prompts, max_new_tokens), seed)

    def steps_of(self, jobs: Sequence[Job], seed: int | None = None) -> Iterator[SampledStep]:
        """The same for prompts with their drafts."""
        lengths = {job.prompt.number: job.draft.length or len(job.draft.tokens) for job in jobs}
        for number, happened in enumerate(self._session.run(jobs, seed=seed), start=1):
            written = [one for one in self._written(happened) if one.position < lengths[one.prompt]]
            yield SampledStep(number, written, happened.results)

    def jobs(self, prompts: Iterable[AnyPrompt] | AnyPrompt, max_new_tokens: int | None = None) -> list[Job]:
        """Prompts with what is to be written for each; see `generate`."""
        each = [Prompt.of(prompt, number) for number, prompt in enumerate(_several(prompts), start=1)]
        if max_new_tokens is not None:
            if max_new_tokens < 1:
                raise ConfigError(f"max_new_tokens {max_new_tokens}: at least 1")
            each = [prompt.with_length(max_new_tokens) for prompt in each]
        return self._session.jobs(each)

    def jobs_of(self, prompts: Sequence[Prompt]) -> list[Job]:
        """The same for prompts that keep their numbers."""
        return self._session.jobs(prompts)

    def _written(self, happened: StepEvent) -> list[WrittenToken]:
        """The changed positions of a step."""
        step = happened.step
        written = []
        for row, column in step.changed.nonzero().tolist():
            masked = bool(step.revision.masked[row, column])
            token = None if masked else int(step.revision.tokens[row, column])
            piece = (
                None if token is None or self.tokenizer is None else text_after(self.tokenizer, self._anchor, [token])
            )
            number, position = int(step.view.stream[row]) + 1, int(step.view.first[row]) + column
            written.append(WrittenToken(number, position, token, piece, float(step.statistics.confidence[row, column])))
        return written

    @property
    def _anchor(self) -> list[int]:
        """A token before which others keep their leading space."""
        return self.tokenizer.encode("a")[-1:] if self.tokenizer is not None else []


@contextmanager
def open_sampler(settings: Settings) -> Iterator[Sampler]:
    """A sampler of settings, in this process. Raises as `Sampler.open` does."""
    from llada_megatron.parallel import device

    device.install()
    import torch

    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint

    if torch.distributed.is_initialized():
        raise ConfigError(
            "this process is in a process group already (another Sampler, a training): leave that first, or make a "
            "Sampler of the model that is loaded there"
        )
    with open_checkpoint(settings.checkpoint) as loaded:
        yield Sampler(loaded, settings)


def _several(prompts: Iterable[AnyPrompt] | AnyPrompt) -> Sequence[AnyPrompt]:
    """One prompt as a list of one; tensors and arrays as lists."""
    if isinstance(prompts, str | bytes | Mapping | Prompt) or not isinstance(prompts, Iterable):
        return [prompts]  # type: ignore[list-item]  # what is no prompt is refused as one
    each = [item.tolist() if hasattr(item, "tolist") else item for item in prompts]
    return [each] if each and all(isinstance(item, int) for item in each) else each


def _as_text(value: Any) -> str:
    """A setting as the command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
