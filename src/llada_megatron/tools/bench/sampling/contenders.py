"""Who takes part in `llada bench sample`: the presets on the small models, and the peers' samplers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.linear import torchs_own
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.presets import PRESETS, Choice, choose
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.tools.bench.sampling.peers import Generated, Peers, Work

BLOCK_LENGTH, THRESHOLD, FACTOR = 32, 0.9, 1.0
"""What the peers run with: their published settings, which the presets of the same names have too."""
WHOLE = ", whole window"
TORCHS = ", torch's own products"
LLADA_PEER, DUAL_PEER = "LLaDA's generate.py", "Fast-dLLM's own: dual cache"


@dataclass(frozen=True)
class Candidate:
    """A preset on one of the two models."""

    preset: str
    """A key of `PRESETS`."""
    attention: str
    """"bidirectional" or "block-causal"."""

    @property
    def name(self) -> str:
        """The preset's, which says more only where the same one runs on the other model besides."""
        both = PRESETS[self.preset].causal is None and self.attention == "block-causal"
        return f"{self.preset} (block-causal)" if both else self.preset


LLADA, DUAL = Candidate("llada", "bidirectional"), Candidate("fast-dllm-dual", "bidirectional")


@dataclass(frozen=True)
class Contender:
    """A sampler that answers prompts."""

    name: str
    write: Callable[[Sequence[Sequence[int]]], list[Generated]]
    """Answers of `new_tokens` each."""
    plotted: bool = False
    peer: bool = False
    """Another project's code."""


@dataclass(frozen=True)
class OurCandidate:
    """The presets on loaded models."""

    models: dict[str, LoadedModel]
    """By their attention, "bidirectional" and "block-causal"; they are the same language's."""
    new_tokens: int

    def contender(
        self, entry: Candidate, *, stop: bool = True, batch_size: int = 1, torchs: bool = False, plotted: bool = False
    ) -> Contender:
        """A preset on a model.

        Args:
            entry: which ones.
            stop: end at the end of text; otherwise the whole window is written.
            batch_size: sequences that run together.
            torchs: leave all matrix products to torch's own choice of a library.
            plotted: whether it belongs in the picture.

        Raises:
            ConfigError: it cannot run on this model.
        """
        loaded = self.models[entry.attention]
        choice = fitted(entry.preset, loaded)
        stop_id = loaded.run.model.eos_token_id if stop else None
        method = choice.method(excluded=[loaded.run.model.mask_token_id], stop_id=stop_id)

        def write(prompts: Sequence[Sequence[int]]) -> list[Generated]:
            with torchs_own() if torchs else contextlib.nullcontext():
                return list(self._write(loaded, method, choice, prompts, batch_size))

        name = entry.name + ("" if stop else WHOLE) + (TORCHS if torchs else "")
        return Contender(name if batch_size == 1 else f"{name}, batch {batch_size}", write, plotted)

    def _write(
        self, loaded: LoadedModel, method: Method, choice: Choice, prompts: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[Generated]:
        drafts = [
            continuation(prompt, self.new_tokens, choice.block_length, stream, choice.grid)
            for stream, prompt in enumerate(prompts)
        ]
        alone = batch_size == 1  # then each is a call of its own, as a user at a prompt makes it
        for part in [[draft] for draft in drafts] if alone else [drafts]:
            writer = SequenceGenerator(loaded, method, batch_size)
            finished = {each.stream: each for step in writer.steps(part) for each in step.finished}
            for stream, each in sorted(finished.items()):
                work = Work(each.passes, each.positions_run, each.rows_read)
                yield Generated(each.tokens[len(prompts[stream]) :], work)


def fitted(preset: str, loaded: LoadedModel) -> Choice:
    """A preset's parts for a model that was trained on replaced tokens.

    Raises:
        ConfigError: it cannot run on this model.
    """
    return choose(preset, None, None, None, {}, loaded.run.objective, loaded.run.model, trained_for_editing=True)


def runnable(presets: Sequence[str], models: dict[str, LoadedModel]) -> tuple[list[Candidate], dict[str, str]]:
    """The presets on each of the models that they are for, and of those that cannot run the reason."""
    entries, reasons = [], {}
    for preset in presets:
        kind = PRESETS[preset].causal
        for attention, causal in (("bidirectional", False), ("block-causal", True)):
            if kind not in (None, causal):
                continue
            try:
                fitted(preset, models[attention])
                entries.append(Candidate(preset, attention))
            except ConfigError as error:
                reasons[preset] = str(error)
    return entries, reasons


def peers_contenders(peers: Peers, new_tokens: int) -> list[Contender]:
    """The samplers of LLaDA and Fast-dLLM; one sequence at a time, since their caches know no batches."""

    def contender(name: str, answer: Callable[[Sequence[int]], Generated]) -> Contender:
        return Contender(name, lambda prompts: [answer(prompt) for prompt in prompts], plotted=True, peer=True)

    common = {"new_tokens": new_tokens, "block_length": BLOCK_LENGTH}
    made = [
        contender(LLADA_PEER, lambda prompt: peers.llada(prompt, steps=new_tokens, **common)),
        contender(DUAL_PEER, lambda prompt: peers.fast_dllm(prompt, cache="dual", threshold=THRESHOLD, **common)),
        contender(
            "Fast-dLLM's own: prefix cache",
            lambda prompt: peers.fast_dllm(prompt, cache="prefix", threshold=THRESHOLD, **common),
        ),
        contender(
            "Fast-dLLM's own: no cache",
            lambda prompt: peers.fast_dllm(prompt, cache="none", threshold=THRESHOLD, **common),
        ),
    ]
    if peers.has_factor:
        made.append(
            contender(
                "Fast-dLLM's own: dual cache, factor",
                lambda prompt: peers.fast_dllm(prompt, cache="dual", factor=FACTOR, **common),
            )
        )
    return made
