"""The interface between training and what is learnt: everything that differs from one objective to another.

Modules of this folder are imported by commands that answer without torch, so they import it inside functions only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.config.training import TrainingConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Batch, Row, Samples
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives.normalization import TokenCounts

    RowMaker = Callable[[NDArray[np.int64], NDArray[np.int32], SampleCoordinates], Row]
    """Tokens `[seq]` of a window, its segment boundaries `[segments + 1]` and its coordinates to a row of a batch."""

REGISTERED: dict[str, type[Objective]] = {}
"""Classes by their kind."""
_O = TypeVar("_O", bound="type[Objective]")


class Objective(ABC):
    """What is learnt, from `objective:` of a run. One instance serves one run; only `state` changes with its steps."""

    kind: ClassVar[str]
    """The value of `objective.kind`; set by `register`."""
    config_class: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    """A subclass where the objective has keys of its own."""
    fills_masks: ClassVar[bool]
    """Whether the model learns to predict masked tokens, so that a sampler can write with it."""
    verifies: ClassVar[bool] = False
    """Whether it also learns to predict the next token with causal attention, and its blocks of masks behind a text
    that is read so: it can verify what it drafts, and no other than a causal text stands before its blocks."""

    training: TrainingConfig | None = None
    """How long and how large the run is; None where there is no run at hand."""
    step: int | None = None
    """The step (from 0) that runs or ran last, or whose pattern a validation uses; None before the first."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    # what is read

    def samples(self, run: RunConfig, split: Split) -> Samples | None:
        """The samples of `split`, "train" or "validation"; None = packed windows of the run's prepared sets."""
        return None

    @abstractmethod
    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """How a window of text becomes a row: inputs, labels and weights, a function of the sample's coordinates.

        It is called for the next step, in a thread, while the present one runs. `vocab_size`: ids of the tokenizer,
        which may be fewer than the model's.
        """

    def has_pairs(self, split: Split) -> bool:
        """Whether samples 2i and 2i + 1 are the same window, the second with the inverse mask."""
        return False

    def embedding_noise(self, step: int) -> float:
        """Standard deviation of the noise on the embeddings of masked tokens at `step` (from 0); 0 = none."""
        return 0.0

    def writes_drafts(self, step: int) -> bool:
        """Whether samples of `step` (from 0) may have positions where the model sees its own prediction
        (`Batch.drafted`)."""
        return False

    @abstractmethod
    def pattern(self, step: int) -> AttentionPattern:
        """Who attends to whom at `step` (from 0)."""

    def sampling_pattern(self, step: int) -> AttentionPattern:
        """Who attends to whom when a model of `step` is read outside training, where a sequence holds its text once."""
        return self.pattern(step)

    def trained_config(self, step: int) -> ObjectiveConfig:
        """What a model after `step` steps has been trained for last, without what came before and comes later."""
        return self.config

    @property
    def copies(self) -> int:
        """How often a sequence holds its text at most, at any step: what the layers compute and remember."""
        return self.pattern(step=0).copies

    def remarks(self) -> list[str]:
        """What is to be said of the samples when a run begins, a line each; asked after `samples`."""
        return []

    # the loss

    def frozen_models(self) -> dict[str, str]:
        """Further models that the loss needs and that are not trained: a name, and the checkpoint to load, each.

        Asked once, before `load_state`.
        """
        return {}

    def factors(self, counts: TokenCounts, batch: Batch) -> Tensor:
        """What the loss of each sequence of `batch` is multiplied by, `[batch]` float32, so that the sum over a global
        batch with these `counts` is normalised as `objective.normalization` says."""
        from llada_megatron.llada_moe.objectives.normalization import normalizer

        return normalizer(self.config.normalization, counts, batch)

    def confidence_factor(self, counts: TokenCounts, batch: Batch) -> float:
        """What the entropies of correctly predicted positions are multiplied by before they are added to the loss, so
        that the sum over a global batch with these `counts` is normalised; 0 = they are not computed."""
        return 0.0

    def loss(self, weighted: Tensor, factors: Tensor, frozen: dict[str, Tensor]) -> Tensor:
        """The scalar that is differentiated, of one micro-batch on the last pipeline stage.

        Args:
            weighted: `[batch]`, sum of weight x cross-entropy over this rank's positions of each sequence, in nats.
            factors: `[batch]`, from `factors`.
            frozen: by name what each frozen model makes of the same micro-batch, like `weighted`; all of them in
                training, none in validation and while a frozen model itself is asked.
        """
        return (weighted * factors).sum()

    # what figures mean

    @property
    def supervised_share(self) -> float:
        """Expected share of the positions that the output layer runs on."""
        return 1.0

    @property
    def loss_is_bound(self) -> bool:
        """Whether the loss is the text's cost in nats per token, or an upper bound of it."""
        return False

    @property
    def validation_is_bound(self) -> bool:
        """Whether the same holds of the weighted sum over the validation's samples, per untruncated token."""
        return False

    @property
    def only_masks_supervised(self) -> bool:
        """Whether the supervised positions are those that are masked with the sample's mask ratio p, weighted 1/p: only
        then does a sequence's weighted sum say what its masked tokens cost at this ratio."""
        return False

    def metrics(self, loss: float, bytes_per_token: float) -> dict[str, float]:
        """Figures of a step's loss beside the loss itself. Bits per byte only where the loss is a bound."""
        return {"bits_per_byte": bits_per_byte(loss, bytes_per_token)} if self.loss_is_bound else {}

    def parts(self, loss: float, clean: float) -> dict[str, float]:
        """Figures of the parts of a step's loss, where it has several. `clean`: what of `loss` is that of the clean
        halves of sequences `[x_t ; x_0]`; 0 where they are not learnt from."""
        return {}

    @abstractmethod
    def description(self) -> str:
        """What is learnt, in one line of a model card."""

    # what is refused, and what survives

    def check(self, refuse: Refuse) -> None:  # noqa: B027 - nothing to refuse is an answer
        """Refuse keys of `objective` that cannot work, each as (dotted key, why)."""

    def check_run(self, run: RunConfig, refuse: Refuse) -> None:  # noqa: B027 - nothing to refuse is an answer
        """Refuse what does not go with the rest of the run, whose sections are right by themselves."""

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps, for `load_state`: what the step number does not say."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - an objective without state has none to load
        """Go on from what `state` gave; an empty dictionary for a checkpoint of a version without it."""


def register(kind: str) -> Callable[[_O], _O]:
    """Class decorator: `objective.kind: KIND` means this class."""

    def add(cls: _O) -> _O:
        if REGISTERED.setdefault(kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"{REGISTERED[kind].__qualname__} and {cls.__qualname__} are both of kind {kind!r}")
        cls.kind = kind
        REGISTERED[kind] = cls
        return cls

    return add


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits needed per UTF-8 byte: nats per token / ln 2 / bytes per token. Comparable between tokenizers."""
    return nats_per_token / math.log(2.0) / bytes_per_token
