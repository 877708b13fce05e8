"""A sharded checkpoint as a source of canonical weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.trained_parts import FACTORS, place_of
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.weights import Unit, Weight, canonical_weights
from llada_megatron.llada_moe.model.factor_product import product_of_factors
from llada_megatron.llada_moe.objectives import trained_objective
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.search import (
    described,
    find_checkpoints,
    first_whole,
    tokenizer_place,
    without_factors,
)
from llada_megatron.tools.convert.source import Findings, is_padding, parameters_by_dtype, place_not_finite


class ShardedSource:
    """A step directory, whatever layout wrote it."""

    def __init__(self, path: Path) -> None:
        """Open a step directory, or the newest whole one of a run.

        Raises:
            CheckpointError: there is none, or its manifest does not say what model it holds.
        """
        self.reader, self.run, self.model = first_whole(find_checkpoints(path), _opened, message)
        self.directory = self.reader.directory
        self.metadata: dict[str, Any] = self.reader.manifest.metadata
        self.lora = self.run.training.lora
        """The low-rank factors beside the weights, into which `read` merges them; None = there are none."""
        if self.lora is not None:
            self.run = replace(self.run, training=replace(self.run.training, lora=None))
            self.metadata = without_factors(self.metadata)

    @property
    def files(self) -> list[Path]:
        """Its files, without the manifest."""
        return [self.directory / name for name in self.reader.manifest.files]

    @property
    def objective(self) -> ObjectiveConfig:
        """What it has been trained for last."""
        return trained_objective(self.run, self.metadata)

    @property
    def kind(self) -> str:
        """What kind of checkpoint it is, in words."""
        return f"sharded, step {self.metadata['step']:,}"

    @property
    def tokenizer(self) -> Path | None:
        """The folder that an import keeps beside the checkpoints, or the file that the training used."""
        place = tokenizer_place(self.directory, self.metadata)
        return place if place is not None and place.exists() else None

    def details(self) -> dict[str, Any]:
        """`files` (a number), `bytes`, and `history` (name and value of what is known of its origin)."""
        layout = self.metadata["layout"].items()
        axes = [f"{axis} {size}" for axis, size in layout if axis.endswith("parallel") and size > 1]
        history = {
            "layout": ", ".join(axes) or "one rank",
            "samples seen": f"{self.metadata['consumed_samples']:,}",
        }
        if "imported" in self.metadata:
            imported = self.metadata["imported"]
            history["imported from"] = f"{imported['from']} ({imported['format']})"
        if "upcycled" in self.metadata:
            history["upcycled from"] = str(self.metadata["upcycled"]["from"])
        if self.lora is not None:
            targets = ", ".join(self.lora.targets)
            history["LoRA"] = f"rank {self.lora.rank}, alpha {self.lora.alpha:g}, on {targets}; merged where it is read"
        if "merged" in self.metadata:
            history["average of"] = ", ".join(each["checkpoint"] for each in self.metadata["merged"])
        files = self.reader.manifest.files
        return {"files": len(files), "bytes": sum(stated.size for stated in files.values()), "history": history}

    def compare(self) -> Findings:
        """Compare its tensors with those of the manifest's model: missing, too many, of another shape."""
        found = dict(self.reader.tensors)
        result = Findings()
        for weight in canonical_weights(self.model):
            if weight.key not in found:
                result.missing.append(weight.key)
                continue
            _, shape = found.pop(weight.key)
            expected = weight.global_shape
            if weight.pattern in weights.VOCABULARY_ROWS and is_padding(expected, shape):
                rows = shape[0] - expected[0]
                result.notes.append(f"{weight.key}: {rows} rows below the vocabulary of {expected[0]} are padding")
            elif shape != expected:
                result.misshapen.append(f"{weight.key} (expected {list(expected)}, found {list(shape)})")
            for key, wanted in self._factor_shapes(weight):
                if key not in found:
                    result.missing.append(key)
                elif (held := found.pop(key)[1]) != wanted:
                    result.misshapen.append(f"{key} (expected {list(wanted)}, found {list(held)})")
        result.extra = sorted(found)
        return result

    def _factor_shapes(self, weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Key and whole shape of both factors of a weight; nothing where it has none."""
        if not self.has_factors(weight):
            return
        assert self.lora is not None
        output, width = weight.shape
        experts = (weight.experts,) if weight.experts else ()
        for name, shape in zip(FACTORS, ((self.lora.rank, width), (output, self.lora.rank)), strict=True):
            yield factor_key(weight, name), (*experts, *shape)

    def has_factors(self, weight: Weight) -> bool:
        """Whether there are low-rank factors of a weight."""
        place = place_of(weight.key.removesuffix(".weight"))
        return self.lora is not None and place is not None and self.lora.adapts(place)

    def require_whole(self) -> list[str]:
        """Return notes on what is ignored. Raises CheckpointError: the tensors are not those of the model."""
        return self.compare().require_none(self.directory, "the model that its manifest describes")

    def dtypes(self) -> dict[str, int]:
        """Number of parameters of each dtype, as torch names it."""
        return parameters_by_dtype(self.reader.tensors.values())

    def dtype(self, unit: Unit) -> torch.dtype:
        """The dtype in which the unit is stored."""
        return self.reader.tensors[unit.weight.key][0]

    def read(self, unit: Unit, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of the unit, with its factors merged into it, in `dtype` or as it is stored."""
        tensor = self.reader.read(unit.weight.key, unit.index, unit.start, unit.stop)
        if self.has_factors(unit.weight):
            assert self.lora is not None
            a = self.reader.read(factor_key(unit.weight, "lora_A"), unit.index)
            b = self.reader.read(factor_key(unit.weight, "lora_B"), unit.index, unit.start, unit.stop)
            merged = tensor.float() + product_of_factors(a, b, self.lora.scale)
            return merged.to(dtype or tensor.dtype)
        return tensor if dtype is None else tensor.to(dtype)

    def not_finite(self, unit: Unit, dtype: torch.dtype | None = None) -> str | None:
        """Name of the weight, position and value of the first NaN or infinity of the unit, or None."""
        return place_not_finite(unit.weight.key, self.read(unit, dtype), unit.start, unit.index)

    def close(self) -> None:
        """Do nothing: no file is held open."""


def factor_key(weight: Weight, factor: str) -> str:
    """What a factor of a weight is called in a checkpoint."""
    return f"{weight.key.removesuffix('weight')}{factor}"


def _opened(path: Path) -> tuple[ShardedReader, RunConfig, ModelConfig]:
    """A step directory, and the run and model that its manifest describes."""
    reader = ShardedReader(path)
    metadata = reader.manifest.metadata
    return reader, described(RunConfig, path, metadata, "run"), described(ModelConfig, path, metadata, "model")
