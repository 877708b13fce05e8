"""Block diffusion: predict the masked tokens of each block from the block itself and the clean blocks before it.

The loss of LLaDA2.0 (tech report, eq. 1) and BD3-LM (arXiv 2503.09573): the model reads a noisy copy of the text and
the text itself, `[x_t ; x_0]`, and the masked tokens of the noisy copy are weighted 1/t. Blocks of one token make it
the exact cost of the text from left to right; where one block holds a whole sequence, nothing is to be seen in the
clean copy, which is left out: that is the loss of `masked_diffusion`. The size of the blocks may change during a run,
which may begin as an autoregressive one: next tokens, without masks and without a second copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from llada_megatron.llada_moe.config.block_schedule import (
    BlockSchedule,
    check_stages,
    check_steps,
    named_stages,
    tokens_per_step,
)
from llada_megatron.llada_moe.config.editing import EditingConfig, check_editing, check_operations
from llada_megatron.llada_moe.config.objective import ObjectiveConfig, check_plain_text
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.autoregressive import autoregressive_row
from llada_megatron.llada_moe.objectives.block_rows import blocks_of, doubled_row
from llada_megatron.llada_moe.objectives.interface import register
from llada_megatron.llada_moe.objectives.masked_diffusion import MaskedDiffusion, diffusion_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import ReplacementVocabulary, SampleCoordinates
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives.interface import RowMaker
    from llada_megatron.llada_moe.objectives.moved_text import Mover


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(ObjectiveConfig):
    """Keys of block diffusion beside those of masked diffusion."""

    time_per: Literal["sequence", "block"] = "sequence"
    """Whether all blocks of a sequence are masked with the same t (LLaDA2), or each with its own (BD3-LM)."""
    weighting: Literal["inverse", "none"] = "inverse"
    """Weight of a masked token: 1/t (LLaDA2's eq. 1), or 1 (its fine-tuning). Validation weighs by 1/t."""
    block_schedule: BlockSchedule | None = None
    """Block sizes that change during the run, the last of which is block_size."""
    editing: EditingConfig | None = None
    """Wrong tokens beside masks in a share of the sequences (LLaDA2.1, LLaDA2.2); null = masks only."""

    @property
    def trains_editing(self) -> bool:
        """Where sequences have wrong tokens."""
        return self.editing is not None and self.editing.share > 0


@register("block_diffusion")
class BlockDiffusion(MaskedDiffusion):
    """Noise of `diffusion.noise` on the first half of `[x_t ; x_0]`; the second half is the text."""

    config_class = BlockDiffusionConfig
    config: BlockDiffusionConfig

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._resumed: dict[str, int] = {}

    @property
    def fills_masks(self) -> bool:  # type: ignore[override]
        """Unless the checkpoint whose state this is has only learnt next tokens so far."""
        return not self._resumed.get("autoregressive")

    @property
    def autoregressive_steps(self) -> int:
        """The number of steps, from the first on, that learn each next token."""
        schedule, training = self.config.block_schedule, self.training
        if schedule is None or training is None:
            return 0
        return schedule.autoregressive_steps(tokens_per_step(training))

    def block_size(self, step: int) -> int:
        """Positions of a block at `step` (from 0); 1 where it learns next tokens."""
        return 1 if step < self.autoregressive_steps else self._stage(step)[1]

    def _stage(self, step: int) -> tuple[int, int]:
        """Number of the stage of `step`, and its block size."""
        schedule, training = self.config.block_schedule, self.training
        if schedule is None or training is None:
            return 0, self.config.block_size or 1
        number = schedule.stage_at(step, tokens_per_step(training))
        return number, schedule.stages[number].block_size

    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """Noise is a function of the seed and the sample's coordinates, as in masked diffusion, and so is the stage of
        a training sample; a validation has the block size of its step, and no wrong tokens."""
        noisy_row, step_of = self._noisy_rows(run, split, vocab_size), self._steps_of_samples(run, split)

        def make(tokens: NDArray[np.int64], boundaries: NDArray[np.int32], at: SampleCoordinates) -> Row:
            step = step_of(at)
            if step < self.autoregressive_steps:
                return autoregressive_row(tokens, boundaries)
            row = noisy_row(tokens, boundaries, at)
            return doubled_row(row, tokens) if self.block_size(step) < len(tokens) else row

        return make

    def _steps_of_samples(self, run: RunConfig, split: Split) -> Callable[[SampleCoordinates], int]:
        """The step of each sample; of a validation, the step after which it is."""
        numbers = run.training.global_batch_size // (2 if self.has_pairs(split) else 1)  # of coordinates in a step
        return lambda at: at.number // numbers if split == "train" else self.step or 0

    def _noisy_rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """The first half of each row."""
        import numpy as np

        from llada_megatron.llada_moe.diffusion.noise import ForwardProcess, ReplacementVocabulary

        training = run.training
        editing = self.config.editing or EditingConfig(share=0.0)
        noise = ForwardProcess(self.config, training.seed, training.global_batch_size, split, editing)
        vocabulary = ReplacementVocabulary(vocab_size, run.model.special_ids) if self.config.trains_editing else None
        mover = _mover(run, vocabulary, editing)
        plain = self.config.weighting == "none" and split == "train"
        step_of = self._steps_of_samples(run, split)

        def make(tokens: NDArray[np.int64], boundaries: NDArray[np.int32], at: SampleCoordinates) -> Row:
            size = self.block_size(step_of(at))
            blocks = blocks_of(boundaries, size) if self.config.time_per == "block" else None
            drawn = noise.corrupt(at, len(tokens), blocks)
            row = diffusion_row(tokens, boundaries, drawn, run.model.mask_token_id, vocabulary, editing.weight)
            if plain:
                row = replace(row, weights=np.where(drawn.mask, np.float32(1.0), row.weights))
            if drawn.moves is not None and mover is not None:
                row = mover.moved(row, drawn.moves, blocks_of(row.boundaries, size), size)
            return row

        return make

    def pattern(self, step: int) -> AttentionPattern:
        """Over both halves; full where a block holds a whole sequence, causal where next tokens are learnt."""
        from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern

        if step < self.autoregressive_steps:
            return CAUSAL
        size = self.block_size(step)
        return FULL if self._is_whole(size) else AttentionPattern(size, doubled=True)

    def embedding_noise(self, step: int) -> float:
        """It begins with the first masks."""
        first = self.autoregressive_steps
        return super().embedding_noise(step - first) if step >= first else 0.0

    def writes_drafts(self, step: int) -> bool:
        """With `editing.draft_share`, once masks are learnt."""
        return self.config.editing is not None and self.config.editing.drafts and step >= self.autoregressive_steps

    @property
    def copies(self) -> int:
        """Twice, unless one block holds the sequence at every step."""
        schedule, training = self.config.block_schedule, self.training
        smallest = self.config.block_size if schedule is None else min(stage.block_size for stage in schedule.stages)
        return 1 if training is not None and (smallest or 1) >= training.sequence_length else 2

    def sampling_pattern(self, step: int) -> AttentionPattern:
        """Blocks of the size that the model was trained with last, which see themselves and all before."""
        from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern

        size = self._last_block_size(step)
        return FULL if self._is_whole(size) else AttentionPattern(size)

    def _last_block_size(self, step: int) -> int:
        return self._resumed.get("block_size", self.block_size(max(step - 1, 0)))

    def _is_whole(self, block_size: int) -> bool:
        """Whether one block holds a whole sequence."""
        return self.training is not None and block_size >= self.training.sequence_length

    def trained_config(self, step: int) -> ObjectiveConfig:
        """Next tokens, one size of blocks, or masked diffusion, as the stage of `step` is."""
        if not self.fills_masks:
            return ObjectiveConfig(kind="autoregressive")
        if self.config.block_schedule is None:
            return self.config
        size = self._last_block_size(step)
        if self._is_whole(size) and not self.verifies:
            return ObjectiveConfig()
        return replace(self.config, block_size=size, block_schedule=None)

    @property
    def supervised_share(self) -> float:
        """The mean mask ratio, and all positions of the sequences that have wrong tokens."""
        share = self.config.editing.share if self.config.editing is not None else 0.0
        return share + (1.0 - share) * (self.config.mask_ratio_min + self.config.mask_ratio_max) / 2

    @property
    def loss_is_bound(self) -> bool:
        """The bound of a block given those before it, summed over blocks, needs what masked diffusion's bound needs."""
        return super().loss_is_bound and self.config.weighting == "inverse"

    @property
    def only_masks_supervised(self) -> bool:
        """Where a sequence has one mask ratio, by which its masked tokens are weighted, and no wrong tokens."""
        if self.step is not None and self.step < self.autoregressive_steps:
            return False
        own = self.config.time_per == "sequence" and self.config.weighting == "inverse"
        return own and not self.config.trains_editing

    def description(self) -> str:
        """The loss, with its blocks, the band of mask ratios and how times are drawn."""
        schedule = self.config.block_schedule
        sizes = [self.config.block_size] if schedule is None else [stage.block_size for stage in schedule.stages]
        band = f"{self.config.mask_ratio_min:g} to {self.config.mask_ratio_max:g}"
        first = "next tokens, then " if schedule is not None and schedule.autoregressive_tokens else ""
        editing, edits = self.config.editing, ""
        if editing is not None and editing.share > 0:
            edits = f"; {editing.share:g} of the sequences have wrong tokens, and are learnt everywhere"
        return (
            f"{first}block diffusion in blocks of {', then '.join(map(str, sizes))}: cross-entropy of masked tokens, "
            f"share masked from {band}, {self.config.time_sampling} times per {self.config.time_per}{edits}"
        )

    def check(self, refuse: Refuse) -> None:
        """Blocks have positions, the stages are in order, text has no answers, and there is something to be edited."""
        check_plain_text(self.config, refuse)
        config = self.config
        if config.replace_ratio:
            why = f"{config.replace_ratio} with kind {self.kind}, which has a section for it: objective.editing"
            refuse("objective.replace_ratio", f"{why}.replace_ratio, beside its share of the sequences")
        check_editing(config.editing, refuse)
        if config.block_schedule is not None and not check_stages(config.block_schedule, config.block_size, refuse):
            return
        check_block_size(config, refuse)

    def check_run(self, run: RunConfig, refuse: Refuse) -> None:
        """Every block size divides the sequence; the stages fill the run and are validated."""
        schedule, length = self.config.block_schedule, run.training.sequence_length
        if schedule is not None:
            sizes = [(f"block_schedule.{name}.block_size", stage.block_size) for name, stage in named_stages(schedule)]
            check_steps(schedule, run.training, run.validation, refuse)
            self._check_autoregressive(schedule, run, refuse)
        else:
            sizes = [("block_size", self.config.block_size or 1)]
        check_operations(self.config.editing, run.model, max(size for _, size in sizes), length, refuse)
        for key, size in sizes:
            if length % size:
                near = max(divisor for divisor in range(1, min(size, length) + 1) if length % divisor == 0)
                why = f"{size} does not divide training.sequence_length {length}; use {near}"
                refuse(f"objective.{key}", why)
            moe = run.model.moe
            if schedule is not None and moe is not None and moe.expert_capacity > 0 and size % moe.routing_block_size:
                why = f"{size} is not a multiple of model.moe.routing_block_size {moe.routing_block_size}"
                refuse(f"objective.{key}", f"{why}: tokens would be routed by those of a later block")

    def _check_autoregressive(self, schedule: BlockSchedule, run: RunConfig, refuse: Refuse) -> None:
        """Next tokens have no masks to invert, and are not routed by tokens that come later."""
        if not schedule.autoregressive_tokens:
            return
        if self.config.complementary_masks:
            why = "true with block_schedule.autoregressive_tokens, whose steps mask no token and would read each window"
            refuse("objective.complementary_masks", f"{why} twice; convert in a run of its own, with checkpoint.load")
        moe = run.model.moe
        if moe is not None and moe.expert_capacity > 0 and moe.routing_block_size > 1:
            why = f"{schedule.autoregressive_tokens} with model.moe.routing_block_size {moe.routing_block_size}"
            refuse("objective.block_schedule.autoregressive_tokens", f"{why}: tokens would be routed by later ones")

    def state(self) -> dict[str, Any]:
        """The stage of the last step, and its block size; or that it learnt next tokens."""
        if self.step is None:
            return dict(self._resumed)
        if self.step < self.autoregressive_steps:
            return {"autoregressive": True, "block_size": 1}
        stage, size = self._stage(self.step)
        return {"stage": stage, "block_size": size}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave: the block size that a sampler of this checkpoint uses."""
        self._resumed, self.step = dict(state), None


def _mover(run: RunConfig, vocabulary: ReplacementVocabulary | None, editing: EditingConfig) -> Mover | None:
    """What moves text, for a model that learns to delete and to insert."""
    from llada_megatron.llada_moe.diffusion.edit_script import Operations
    from llada_megatron.llada_moe.objectives.moved_text import Mover

    delete_id, insert_id = run.model.delete_token_id, run.model.insert_token_id
    if vocabulary is None or not editing.moves or delete_id is None or insert_id is None:
        return None
    return Mover(Operations(delete_id, insert_id, run.model.mask_token_id), vocabulary, editing.weight)


def check_block_size(config: ObjectiveConfig, refuse: Refuse) -> None:
    """There is a block, and it has positions."""
    if config.block_size is None or config.block_size < 1:
        found = "null" if config.block_size is None else config.block_size
        refuse("objective.block_size", f"{found}, but kind {config.kind} needs the size of a block (LLaDA2: 32)")
