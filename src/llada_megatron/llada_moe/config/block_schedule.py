"""Block sizes that change during a run: the keys of `objective.block_schedule`, and the steps at which they do.

LLaDA2.0 (tech report, section 4) turns an autoregressive model into a diffusion model by warm-up, stable and decay
stages over block sizes: 1, 4, 32, 64, 4096; the whole sequence in one block; then 2048 and less, down to 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from llada_megatron.llada_moe.config.intervals import ValidationConfig
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.config.training import TrainingConfig

KEY = "objective.block_schedule"


@dataclass(frozen=True, kw_only=True)
class BlockStage:
    """Training with one block size."""

    block_size: int
    tokens: int
    """Tokens of text; the stage ends with the first step that completes them."""


@dataclass(frozen=True, kw_only=True)
class BlockSchedule:
    """Stages over block sizes: ascending, then the largest, then descending to the `block_size` of the objective."""

    autoregressive_tokens: int = 0
    """Tokens of text from which the run learns each next token, under causal attention, before it converts the model.
    0 = none: the model is autoregressive already (checkpoint.load), or never was."""
    warmup: list[BlockStage] = field(default_factory=list)
    stable: BlockStage
    decay: list[BlockStage] = field(default_factory=list)

    @property
    def stages(self) -> list[BlockStage]:
        """All of them in order."""
        return [*self.warmup, self.stable, *self.decay]

    def ends(self, tokens_per_step: int) -> list[int]:
        """The number of steps that are done when each stage ends."""
        done = accumulate((stage.tokens for stage in self.stages), initial=self.autoregressive_tokens)
        return [-(-tokens // tokens_per_step) for tokens in done][1:]

    def autoregressive_steps(self, tokens_per_step: int) -> int:
        """The number of steps before the first stage."""
        return -(-self.autoregressive_tokens // tokens_per_step)

    def stage_at(self, step: int, tokens_per_step: int) -> int:
        """Which stage `step` (from 0) belongs to; the last one also beyond its end."""
        ends = self.ends(tokens_per_step)
        return next((number for number, end in enumerate(ends) if step < end), len(ends) - 1)


def tokens_per_step(training: TrainingConfig) -> int:
    """Tokens of text that a step reads."""
    return training.global_batch_size * training.sequence_length


def check_stages(schedule: BlockSchedule, last: int | None, refuse: Refuse) -> bool:
    """Each stage by itself, and their order. `last`: the block size of the objective. Returns whether all is well."""
    if schedule.autoregressive_tokens < 0:
        refuse(f"{KEY}.autoregressive_tokens", f"{schedule.autoregressive_tokens} must not be negative; 0 = none")
        return False
    for name, stage in named_stages(schedule):
        for key in ("block_size", "tokens"):
            if getattr(stage, key) < 1:
                refuse(f"{KEY}.{name}.{key}", f"{getattr(stage, key)} must be at least 1")
                return False
    up = [stage.block_size for stage in (*schedule.warmup, schedule.stable)]
    down = [stage.block_size for stage in (schedule.stable, *schedule.decay)]
    if any(before >= after for before, after in pairwise(up)):
        refuse(f"{KEY}.warmup", f"the block sizes {_listed(up)}, the last of the stable stage, do not grow")
        return False
    if any(before <= after for before, after in pairwise(down)):
        refuse(f"{KEY}.decay", f"the block sizes {_listed(down)}, the first of the stable stage, do not shrink")
        return False
    if last != down[-1]:
        refuse(
            "objective.block_size",
            f"{'null' if last is None else last}, but the schedule ends with blocks of {down[-1]}: a model writes in "
            f"blocks of the size that it was trained with last; set {down[-1]}",
        )
        return False
    return True


def check_steps(
    schedule: BlockSchedule, training: TrainingConfig, validation: ValidationConfig, refuse: Refuse
) -> None:
    """The stages fill the steps of the run, and each is validated at least once."""
    size = tokens_per_step(training)
    ends = schedule.ends(size)
    if ends[-1] != training.steps:
        refuse(
            "training.steps",
            f"{training.steps} steps of {size} tokens are {training.steps * size}, but the stages of {KEY} are "
            f"{schedule.autoregressive_tokens + sum(stage.tokens for stage in schedule.stages)} tokens; set "
            f"training.steps={ends[-1]}",
        )
        return
    if validation.interval < 1:
        refuse("validation.interval", f"{validation.interval}, but every stage of {KEY} is validated; set the steps")
        return
    first = schedule.autoregressive_steps(size)
    keys = [(f"{name}.tokens", stage.tokens) for name, stage in named_stages(schedule)]
    if first:
        keys, ends = [("autoregressive_tokens", schedule.autoregressive_tokens), *keys], [first, *ends]
    for (key, tokens), start, end in zip(keys, [0, *ends], ends, strict=False):
        if start == end:
            refuse(f"{KEY}.{key}", f"{tokens} is less than a step, and no step is left for it")
        elif end // validation.interval == start // validation.interval:
            refuse(
                f"{KEY}.{key}",
                f"the stage is steps {start + 1} to {end}, and with validation.interval {validation.interval} none of "
                f"them is validated; set validation.interval={end - start} or less",
            )


def named_stages(schedule: BlockSchedule) -> list[tuple[str, BlockStage]]:
    """Each stage with its key inside the schedule."""
    return [
        *((f"warmup.{number}", stage) for number, stage in enumerate(schedule.warmup)),
        ("stable", schedule.stable),
        *((f"decay.{number}", stage) for number, stage in enumerate(schedule.decay)),
    ]


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
