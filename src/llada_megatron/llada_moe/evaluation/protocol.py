"""How a likelihood is measured: everything that two figures must have in common in order to be compared."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from llada_megatron.llada_moe.errors import ConfigError

EstimatorName = Literal["bound", "confidence", "left-to-right", "next-token"]
"""How a log-likelihood is estimated; `next-token` is an autoregressive model's, and the only one that it has. A model
that learnt next tokens and blocks of masks at once has all."""

MEANING = {
    "bound": "any-order bound, mean of (L / l) x sum of log p over l of the L answer tokens masked, l uniform in 1..L",
    "confidence": "chain in order of confidence: the masked token that the model is most sure of is revealed first",
    "left-to-right": "exact log-likelihood of the decoder that unmasks from left to right",
    "next-token": "exact log-likelihood of a decoder of next tokens, a text without context behind end-of-text",
}


@dataclass(frozen=True)
class LikelihoodProtocol:
    """The settings of an estimator."""

    estimator: EstimatorName | None = None
    """None = what `of_model` chooses: the bound, or next-token of a model that learnt it."""
    samples: int = 128
    """Masks drawn for each answer (of each block, for a block-causal model). Read by `bound` only."""
    stratum: int = 8
    """Samples whose numbers of masked tokens are spread evenly over 1..L; a standard error is taken over strata."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance: u + (w + 1) x (c - u), u with the context masked; 0 = off."""
    seed: int = 0
    shared_masks: bool = True
    """Whether the options of one question are measured under the same masks, so far as they are equally long."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting that cannot be."""
        if self.estimator not in (None, *get_args(EstimatorName)):
            raise ConfigError(f"estimator {self.estimator!r}: one of {', '.join(get_args(EstimatorName))}")
        if self.samples < 1 or self.stratum < 1:
            raise ConfigError(f"samples {self.samples} in strata of {self.stratum}: at least 1 each")
        if self.samples % self.stratum:
            raise ConfigError(
                f"samples {self.samples}: a multiple of the stratum, {self.stratum}, so that every number of masked "
                "tokens is equally likely"
            )
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance {self.guidance}: a finite number")

    def of_model(self, fills_masks: bool, verifies: bool = False) -> LikelihoodProtocol:
        """This protocol for a model: with the estimator that such a model has where none was chosen.

        Args:
            fills_masks: whether the model is a diffusion model; an autoregressive one has one protocol.
            verifies: whether a diffusion model also predicts the next token (`ModelKind.verifies`).

        Raises:
            ConfigError: the model does not have what was chosen.
        """
        usual: EstimatorName = "bound" if fills_masks and not verifies else "next-token"
        chosen = replace(self, estimator=self.estimator or usual)
        if fills_masks and not verifies and chosen.estimator == "next-token":
            raise ConfigError("estimator next-token: a diffusion model has bound, confidence, left-to-right")
        if not fills_masks and chosen.estimator != "next-token":
            raise ConfigError(f"estimator {chosen.estimator}: an autoregressive model has its exact one, next-token")
        if chosen.estimator == "next-token" and chosen.guidance:
            what = "next-token has no mask for the context; use bound" if verifies else ""
            what = what or "an autoregressive model cannot mask the context"
            raise ConfigError(f"guidance {chosen.guidance:g}: {what}")
        return chosen

    @property
    def is_bound(self) -> bool:
        """Whether masks are drawn, and the figure is a lower bound; otherwise it is that of one decoding order."""
        return self.estimator in (None, "bound")

    @property
    def meaning(self) -> str:
        """What the estimator estimates."""
        return MEANING[self.estimator or "bound"]

    def record(self) -> dict[str, Any]:
        """The settings that matter, as plain values: what a figure is written down with."""
        every = asdict(self) | {"meaning": self.meaning}
        unread = () if self.is_bound else ("samples", "stratum", "seed", "shared_masks")
        return {name: value for name, value in every.items() if name not in unread}

    def __str__(self) -> str:
        """The settings in one line."""
        drawn = f"; {self.samples} samples in strata of {self.stratum}, seed {self.seed}, masks " + (
            "shared by the options of a question" if self.shared_masks else "drawn for each option"
        )
        guidance = f"; guidance {self.guidance:g}" if self.guidance else "; no guidance"
        return f"{self.estimator or 'bound'}: {self.meaning}{drawn if self.is_bound else ''}{guidance}"
