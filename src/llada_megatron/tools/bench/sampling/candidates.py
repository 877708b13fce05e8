"""What takes part in `llada bench sample`: the presets on the small models, and samplers of other projects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.linear import torchs_own
from llada_megatron.llada_moe.sampling.editors import NoEditor, never_written
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.presets import PRESETS, Choice, Preset, choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.generator import SequenceGenerator


@dataclass
class Work:
    """What a sampler made the model do."""

    forwards: int = 0
    """Calls of the model."""
    positions: int = 0
    """Positions that ran through its layers, summed over the calls."""
    logit_rows: int = 0
    """Rows of logits that were computed."""


@dataclass(frozen=True)
class Generated:
    """The result for one prompt."""

    tokens: list[int]
    """The response, `new_tokens` long."""
    work: Work


WHOLE, TORCHS, NO_EDITOR = ", whole window", ", torch's own products", ", no editor"
"""What the name of a candidate ends with that differs from the preset it is named after."""


@dataclass(frozen=True)
class PresetOnModel:
    """A preset on one of the models."""

    preset: str
    """A key of `PRESETS`."""
    attention: str
    """Which: "bidirectional", "block-causal", "editing" (block-causal, and learnt to delete and insert), or "joint"."""
    edits: bool = True
    """Whether it has its editor."""

    @property
    def name(self) -> str:
        """The preset's, which says more only where the same one runs on another model besides."""
        if self.attention == "editing":
            return f"{self.preset} (editing)" + ("" if self.edits else NO_EDITOR)
        both = PRESETS[self.preset].causal is None and self.attention == "block-causal"
        return f"{self.preset} (block-causal)" if both else self.preset


LLADA, DUAL = PresetOnModel("llada", "bidirectional"), PresetOnModel("fast-dllm-dual", "bidirectional")
"""The presets that are compared token by token with other projects' code."""
SPECULATION, DECODING = PresetOnModel("self-speculation", "joint"), PresetOnModel("autoregressive", "joint")
"""The presets that must write the same tokens."""


@dataclass(frozen=True)
class Candidate:
    """A sampler that takes part: it answers prompts, and is measured while it does."""

    name: str
    write: Callable[[Sequence[Sequence[int]]], list[Generated]]
    """Answers of `new_tokens` each."""
    plotted: bool = False
    """It belongs in the picture."""
    peer: bool = False
    """It is another project's code."""


@dataclass(frozen=True)
class PeerCandidates:
    """Samplers of other projects that take part beside the presets, one sequence at a time."""

    fixed_steps: Candidate
    """It does what `LLADA` does over the whole window; all times are compared with its."""
    dual_cache: Candidate
    """It does what `DUAL` does over the whole window."""
    others: Sequence[Candidate] = ()


@dataclass(frozen=True)
class OurSamplers:
    """The presets on loaded models."""

    models: dict[str, LoadedModel]
    """By `PresetOnModel.attention`; they are the same language's."""
    new_tokens: int

    def candidate(
        self,
        preset: PresetOnModel,
        *,
        stop: bool = True,
        batch_size: int = 1,
        torchs: bool = False,
        plotted: bool = False,
        overrides: Mapping[str, str] | None = None,
    ) -> Candidate:
        """A preset on a model.

        Args:
            preset: the preset and the model.
            stop: end at the end of text; otherwise the whole window is written.
            batch_size: sequences that run together.
            torchs: leave all matrix products to torch's own choice of a library.
            plotted: whether it belongs in the picture.
            overrides: settings other than the published ones, such as {"schedule.threshold": "0.8"}.

        Raises:
            ConfigError: it cannot run on this model.
        """
        loaded = self.models[preset.attention]
        choice = fitted(preset, loaded, overrides or {})
        stop_id = loaded.run.model.eos_token_id if stop else None
        method = choice.method(excluded=never_written(loaded.run.model, choice.editor), stop_id=stop_id)

        def write(prompts: Sequence[Sequence[int]]) -> list[Generated]:
            with torchs_own() if torchs else contextlib.nullcontext():
                return list(self._write(loaded, method, choice, prompts, batch_size))

        name = preset.name + ("" if stop else WHOLE) + (TORCHS if torchs else "")
        name += "".join(f", {key}={value}" for key, value in (overrides or {}).items())
        return Candidate(name if batch_size == 1 else f"{name}, batch {batch_size}", write, plotted)

    def _write(
        self, loaded: LoadedModel, method: Method, choice: Choice, prompts: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[Generated]:
        requests = [
            continuation(prompt, self.new_tokens, choice.block_length, stream, choice.grid)
            for stream, prompt in enumerate(prompts)
        ]
        alone = batch_size == 1  # then each is a call of its own, as a user at a prompt makes it
        for part in [[request] for request in requests] if alone else [requests]:
            writer = SequenceGenerator(loaded, method, batch_size)
            finished = {each.stream: each for step in writer.steps(part) for each in step.finished}
            for stream, each in sorted(finished.items()):
                work = Work(each.passes, each.positions_run, each.rows_read)
                yield Generated(each.tokens[len(prompts[stream]) :], work)


def fitted(preset: PresetOnModel, loaded: LoadedModel, overrides: Mapping[str, str] = MappingProxyType({})) -> Choice:
    """A preset's parts, some settings replaced, for a model that was trained on replaced tokens.

    Raises:
        ConfigError: it cannot run on this model.
    """
    editor, run = None if preset.edits else "none", loaded.run
    return choose(preset.preset, None, None, editor, overrides, run.objective, run.model, trained_for_editing=True)


def _models_for(preset: Preset) -> list[str]:
    """The models, by their attention, that a preset is for."""
    if preset.verifies:
        return ["joint"]
    return [
        name for name, causal in (("bidirectional", False), ("block-causal", True)) if preset.causal in (None, causal)
    ]


def runnable(presets: Sequence[str], models: dict[str, LoadedModel]) -> tuple[list[PresetOnModel], dict[str, str]]:
    """The presets on each of the models that they are for, and of those that run on none the reason.

    On the model that learnt all operations there are those that edit, and each of its schedules without an editor.
    """
    found: list[PresetOnModel] = []
    reasons = {}
    for preset in presets:
        kind, edits = PRESETS[preset].causal, PRESETS[preset].editor != NoEditor()
        tried = [PresetOnModel(preset, name) for name in _models_for(PRESETS[preset])]
        if kind and "editing" in models and not PRESETS[preset].verifies:
            tried += [PresetOnModel(preset, "editing")] + [PresetOnModel(preset, "editing", edits=False)] * edits
        for each in tried:
            try:
                fitted(each, models[each.attention])
                found.append(each)
            except ConfigError as error:
                reasons[preset] = str(error)
    return found, {name: why for name, why in reasons.items() if name not in {each.preset for each in found}}
