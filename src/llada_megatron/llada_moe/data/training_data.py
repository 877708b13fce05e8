"""Training data by sample number: the same numbers give the same batch on every rank, after every restart."""

from __future__ import annotations

from collections.abc import Sequence

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Row, Samples, collate
from llada_megatron.llada_moe.data.packing import Blend, PackedDataset, Split
from llada_megatron.llada_moe.data.set_manifest import SetManifest, read_manifest, read_repeats
from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.objectives import Objective, make_objective


class TrainingData:
    """The blend of a run's sets, packed and corrupted. Holds no position: resuming is asking for the next numbers.

    Sample i of step s is number s * global_batch_size + i. Over numbers 0, 1, 2, … each set runs through all its
    windows, every epoch in a new order and with new masks.
    """

    def __init__(self, run: RunConfig, split: Split = "train", objective: Objective | None = None) -> None:
        """Open and check every set. Raises DataError or ConfigError, naming the key to change.

        `objective`: what makes rows of windows; None = that of the run.
        """
        self.manifests: list[SetManifest] = [read_manifest(entry.path) for entry in run.data.sets]
        check_manifests(run, self.manifests)
        training, data = run.training, run.data
        self.sets = [
            PackedDataset(
                entry.path,
                training.sequence_length,
                split,
                data.validation_fraction,
                training.seed,
                data.isolate_documents,
                read_repeats(entry.path, manifest),
            )
            for entry, manifest in zip(data.sets, self.manifests, strict=True)
        ]
        self.blend = Blend([entry.weight for entry in data.sets])
        objective = make_objective(run.objective, run.training) if objective is None else objective
        self._pairs = objective.has_pairs(split)
        self._make_row = objective.rows(run, split, self.manifests[0].tokenizer.vocab_size)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of this split, over the blend (an end-of-text token is one without bytes)."""
        return sum(share * s.bytes_per_token for share, s in zip(self.blend.shares, self.sets, strict=True))

    def locate(self, number: int) -> SampleCoordinates:
        """Set, epoch and window of sample `number`, by arithmetic alone; both samples of a pair have the same."""
        number, second = divmod(number, 2) if self._pairs else (number, 0)
        chosen, before = self.blend.locate(number)
        epoch, place = divmod(before, self.sets[chosen].windows)
        return SampleCoordinates(number, chosen, epoch, self.sets[chosen].order(epoch, place, chosen), bool(second))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these global numbers, in this order."""
        return collate([self._row(self.locate(number)) for number in indices])

    def _row(self, at: SampleCoordinates) -> Row:
        """One sequence as the objective wants it."""
        tokens, boundaries = self.sets[at.set].window(at.window)
        return self._make_row(tokens, boundaries, at)


def samples_of(objective: Objective, run: RunConfig, split: Split) -> Samples:
    """The samples that an objective reads: its own, or packed windows of the run's prepared sets."""
    own = objective.samples(run, split)
    return TrainingData(run, split, objective) if own is None else own


def check_manifests(run: RunConfig, manifests: Sequence[SetManifest]) -> None:
    """The sets share one tokenizer, and the model has its ids. Raises DataError or ConfigError."""
    first = run.data.sets[0].path
    for entry, manifest in zip(run.data.sets, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise DataError(
                f"{entry.path} and {first} were prepared with different tokenizers "
                f"({manifest.tokenizer.sha256[:12]} and {manifests[0].tokenizer.sha256[:12]}); "
                f"prepare one again with --tokenizer {first}.tokenizer{manifests[0].tokenizer.suffix}"
            )
        _check_ids(run.model, entry.path, manifest)


def _check_ids(model: ModelConfig, path: str, manifest: SetManifest) -> None:
    """Vocabulary and special tokens of the model are those of a set's tokenizer."""
    facts = manifest.tokenizer
    if facts.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {model.vocab_size} is less than the {facts.vocab_size} ids of the tokenizer of {path}; "
            f"set model.vocab_size={facts.vocab_size} or more"
        )
    if facts.mask_id != model.mask_token_id:
        raise ConfigError(
            f"model.mask_token_id: {model.mask_token_id}, but {path} was prepared with mask id {facts.mask_id}; "
            f"set model.mask_token_id={facts.mask_id}"
        )
    if facts.eos_id != model.eos_token_id:
        raise ConfigError(
            f"model.eos_token_id: {model.eos_token_id}, but {path} was prepared with end-of-text id {facts.eos_id}; "
            f"set model.eos_token_id={facts.eos_id}"
        )
