"""The Python interface of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.results import Result, text_after
from llada_megatron.parallel.sampling.settings import GraphUse, Settings

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
    """Position in the sequence, its prompt included."""
    token: int | None
    """The new token; None = the position is masked again."""
    piece: str | None
    """The text of the token; None without a tokenizer. A part of a character reads as U+FFFD."""
    confidence: float
    """Probability that the model gave to the token in this step."""


@dataclass(frozen=True)
class SampledStep:
    """What one forward pass changed."""

    number: int
    """Number of the pass, from 1."""
    written: list[WrittenToken]
    finished: list[Result]
    """Sequences that the pass completed."""


class Sampler:
    """Samples from a checkpoint.

    >>> with Sampler.open("runs/demo", schedule="threshold", block_length=32) as sampler:
    ...     for result in sampler.generate(["def main(", "class "], max_new_tokens=48):
    ...         print(result.text)
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        """A sampler of a model that is loaded. Every rank of its world makes one, and makes the same calls."""
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
        cuda_graphs: GraphUse = "auto",
        fp8: str | None = None,
    ) -> Iterator[Sampler]:
        """Load a checkpoint in this process, which must not be in another process group meanwhile.

        Args:
            checkpoint: a run's output directory (its newest complete checkpoint) or a step directory.
            tokenizer: where the checkpoint's tokenizer is now, if it was moved.
            preset: a published method (`llada sample --list-presets`).
            schedule: the rule for which masks are committed in a step, instead of that of the preset.
            cache: the rule for which keys and values are reused, instead of that of the preset.
            editor: the rule by which sampled tokens may change, instead of that of the preset.
            overrides: settings of these rules, such as {"schedule.threshold": 0.8}.
            block_length: positions of a block; blocks are sampled from left to right. None = that of the preset, and
                without a preset one single block.
            temperature: 0 = the most probable token.
            guidance: weight of classifier-free guidance, 0 = off.
            seed: seed of the random draws.
            batch_size: sequences that run together.
            max_new_tokens: new tokens of a continuation.
            trained_for_editing: the model was trained for editing, although its configuration does not say so.
            cuda_graphs: whether a GPU replays passes as CUDA graphs: where it can ("auto"), or "always", which is an
                error where it cannot, or "never".
            fp8: the recipe of FP8 ("blockwise", "tensorwise") in which a GPU keeps the layers' weights and computes.

        Raises:
            ConfigError: the method does not exist, or does not fit the model; or FP8 does not.
            ResourceError: FP8 is asked for where no GPU or no Transformer Engine has it.
            CheckpointError: there is no complete checkpoint.
            DataError: the tokenizer is not the one that the checkpoint was trained with.
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
            cuda_graphs=cuda_graphs,
            fp8=fp8,
        )
        with open_sampler(settings) as sampler:
            yield sampler

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the checkpoint. None = it has none, and prompts must be token ids."""
        return self._session.tokenizer

    @property
    def session(self) -> Session:
        """The session that does the sampling, for the command line."""
        return self._session

    def generate(
        self,
        prompts: Iterable[AnyPrompt] | AnyPrompt,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[Result]:
        """The results of the prompts, in the order of the prompts; a single prompt gives a list of one.

        Random draws depend on the seed and on the number of a prompt in the call, not on the prompts that it runs
        together with. So the same call gives the same tokens; rollouts during training pass another seed each time.

        Args:
            prompts: texts or token ids, which are continued, or prompts of `Prompt.with_gaps` and `Prompt.edited`.
            max_new_tokens: new tokens of continuations; None = as in `open`.
            seed: seed of the random draws; None = as in `open`.

        Raises:
            ConfigError: a prompt is too long, or has no gap to fill.
            DataError: a prompt is a text and the checkpoint has no tokenizer.
        """
        jobs = self.jobs(prompts, max_new_tokens)
        results = [result for event in self._session.run(jobs, seed=seed) for result in event.results]
        return sorted(results, key=lambda result: result.number)

    def steps(
        self,
        prompts: Iterable[AnyPrompt] | AnyPrompt,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> Iterator[SampledStep]:
        """Sample prompts and yield what each step changes; arguments and errors are those of `generate`."""
        yield from self.steps_of(self.jobs(prompts, max_new_tokens), seed)

    def steps_of(self, jobs: Sequence[Job], seed: int | None = None) -> Iterator[SampledStep]:
        """As `steps`, for jobs made by `jobs` or `jobs_of`."""
        lengths = {job.prompt.number: job.request.length or len(job.request.tokens) for job in jobs}
        for number, event in enumerate(self._session.run(jobs, seed=seed), start=1):
            written = [one for one in self._written(event) if one.position < lengths[one.prompt]]
            yield SampledStep(number, written, event.results)

    def jobs(self, prompts: Iterable[AnyPrompt] | AnyPrompt, max_new_tokens: int | None = None) -> list[Job]:
        """The jobs of prompts, which are numbered from 1; arguments and errors are those of `generate`."""
        each = [Prompt.of(prompt, number) for number, prompt in enumerate(_several(prompts), start=1)]
        if max_new_tokens is not None:
            if max_new_tokens < 1:
                raise ConfigError(f"max_new_tokens {max_new_tokens}: at least 1")
            each = [prompt.with_length(max_new_tokens) for prompt in each]
        return self._session.jobs(each)

    def jobs_of(self, prompts: Sequence[Prompt]) -> list[Job]:
        """The jobs of prompts that keep their numbers."""
        return self._session.jobs(prompts)

    def _written(self, event: StepEvent) -> list[WrittenToken]:
        """The positions that a step changed."""
        step = event.step
        written = []
        for row, column in step.changed.nonzero().tolist():
            masked = bool(step.revision.masked[row, column])
            token = None if masked else int(step.revision.tokens[row, column])
            piece = (
                None if token is None or self.tokenizer is None else text_after(self.tokenizer, self._anchor, [token])
            )
            number, position = int(step.block.stream[row]) + 1, int(step.block.first[row]) + column
            written.append(WrittenToken(number, position, token, piece, float(step.statistics.confidence[row, column])))
        return written

    @property
    def _anchor(self) -> list[int]:
        """A token to decode others after, so that they keep their leading space."""
        return self.tokenizer.encode("a")[-1:] if self.tokenizer is not None else []


@contextmanager
def open_sampler(settings: Settings) -> Iterator[Sampler]:
    """A sampler with these settings, in this process. Raises what `Sampler.open` raises."""
    from llada_megatron.parallel import device

    device.install()
    import torch

    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint

    if torch.distributed.is_initialized():
        raise ConfigError(
            "this process is in a process group already (another Sampler, a training): leave that first, or make a "
            "Sampler of the model that is loaded there"
        )
    with open_checkpoint(settings.checkpoint, fp8=settings.fp8) as loaded:
        yield Sampler(loaded, settings)


def _several(prompts: Iterable[AnyPrompt] | AnyPrompt) -> Sequence[AnyPrompt]:
    """A sequence of prompts: a single one becomes a list of one, tensors and arrays become lists."""
    if isinstance(prompts, str | bytes | Mapping | Prompt) or not isinstance(prompts, Iterable):
        return [prompts]  # type: ignore[list-item]  # an object that is not a prompt is refused later
    each = [item.tolist() if hasattr(item, "tolist") else item for item in prompts]
    return [each] if each and all(isinstance(item, int) for item in each) else each


def _as_text(value: Any) -> str:
    """A setting as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
