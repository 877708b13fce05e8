"""Autoregression and block diffusion at once: the next token on the clean half, masked blocks on the noisy half.

The two losses of `[x_t ; x_0]` in one pass, as Nemotron-Labs-Diffusion trains them (1.0 and 0.3): the clean half is
causal, so that it predicts its next tokens, and noisy blocks see the clean tokens before them as a decoder computes
them. A model of this kind drafts a block and verifies it with one and the same cache of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.autoregressive import autoregressive_row
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.block_rows import doubled_row
from llada_megatron.llada_moe.objectives.interface import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives.interface import RowMaker


@dataclass(frozen=True, kw_only=True)
class JointConfig(BlockDiffusionConfig):
    """Keys of the two losses beside those of block diffusion."""

    autoregressive_coefficient: float = 1.0
    """What the loss of the next tokens is multiplied by (Nemotron-Labs-Diffusion: 1.0)."""
    diffusion_coefficient: float = 0.3
    """What the loss of the masked tokens is multiplied by (Nemotron-Labs-Diffusion: 0.3)."""


@register("joint")
class Joint(BlockDiffusion):
    """Block diffusion whose clean half is causal and predicts its next tokens."""

    config_class = JointConfig
    config: JointConfig
    verifies = True

    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """As of block diffusion, with the next tokens as labels of the clean half; a validation weighs both halves by
        their own weights, so that the sum of each is a cost of the text."""
        noisy_row = self._noisy_rows(run, split, vocab_size)
        of_noisy, of_clean = self.config.diffusion_coefficient, self.config.autoregressive_coefficient
        if split == "validation":
            of_noisy = of_clean = 1.0

        def make(tokens: NDArray[np.int64], boundaries: NDArray[np.int32], at: SampleCoordinates) -> Row:
            row = noisy_row(tokens, boundaries, at)
            return joint_row(replace(row, weights=row.weights * of_noisy), tokens, of_clean)

        return make

    def pattern(self, step: int) -> AttentionPattern:
        """Over both halves, the clean one causal, also where a block holds a whole sequence."""
        from llada_megatron.llada_moe.model.patterns import AttentionPattern

        return AttentionPattern(self.block_size(step), doubled=True, causal_clean=True)

    def sampling_pattern(self, step: int) -> AttentionPattern:
        """Causal: blocks that see themselves whole are those of a sampler's pass (`model.windows`)."""
        from llada_megatron.llada_moe.model.patterns import CAUSAL

        return CAUSAL

    @property
    def copies(self) -> int:
        """Always twice."""
        return 2

    @property
    def supervised_share(self) -> float:
        """Rows per token of the text: its next token, and itself where it is masked."""
        return 1.0 + super().supervised_share

    @property
    def loss_is_bound(self) -> bool:
        """It is a weighted sum of two costs of the same text."""
        return False

    @property
    def only_masks_supervised(self) -> bool:
        """Next tokens are, too."""
        return False

    def parts(self, loss: float, clean: float) -> dict[str, float]:
        """Both losses without their coefficients."""
        return {
            "loss_autoregressive": clean / self.config.autoregressive_coefficient,
            "loss_diffusion": (loss - clean) / self.config.diffusion_coefficient,
        }

    def description(self) -> str:
        """Both losses and their coefficients."""
        of_clean, of_noisy = self.config.autoregressive_coefficient, self.config.diffusion_coefficient
        return f"{of_clean:g} x next token + {of_noisy:g} x {super().description()}"

    def check(self, refuse: Refuse) -> None:
        """As of block diffusion; and there are two losses at every step, of text as it is."""
        super().check(refuse)
        schedule = self.config.block_schedule
        if schedule is not None and schedule.autoregressive_tokens:
            why = f"{schedule.autoregressive_tokens} with kind {self.kind}, whose every step learns next tokens; use 0"
            refuse("objective.block_schedule.autoregressive_tokens", why)
        if self.config.trains_editing:
            refuse("objective.editing", f"does not go with kind {self.kind}; use kind block_diffusion, or share 0")
        for key in ("autoregressive_coefficient", "diffusion_coefficient"):
            value = getattr(self.config, key)
            if not 0 < value < float("inf"):
                other = "block_diffusion" if key.startswith("auto") else "autoregressive"
                refuse(f"objective.{key}", f"{value} must be a number above 0; a run without this loss is kind {other}")

    def check_run(self, run: RunConfig, refuse: Refuse) -> None:
        """As of block diffusion; and no token is routed by those after it."""
        super().check_run(run, refuse)
        if run.model.moe is not None and run.model.moe.expert_capacity:
            why = "tokens of a block choose their experts together, so that the next token would be known to the router"
            refuse(
                "model.moe.expert_capacity", f"{run.model.moe.expert_capacity} with objective.kind {self.kind}: {why}"
            )


def joint_row(noisy: Row, tokens: NDArray[np.int64], coefficient: float) -> Row:
    """`[x_t ; x_0]`, whose second half predicts its next tokens with weight `coefficient`, except behind a cut."""
    import numpy as np

    clean = autoregressive_row(tokens, noisy.boundaries)
    row, length = doubled_row(noisy, tokens), len(tokens)
    kept = (np.arange(length) < noisy.untruncated).astype(np.float32)
    return replace(
        row,
        labels=np.concatenate([row.labels[:length], clean.labels]),
        weights=np.concatenate([noisy.weights, clean.weights * kept * np.float32(coefficient)]),
    )
