"""What a pass of fixed shape costs or gains: replayed as a CUDA graph on a GPU, run from Python on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.parallel import device
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.cuda_graphs import Recorded, Recorder, obstacle_to, recorder_of
from llada_megatron.parallel.sampling.generator import SequenceGenerator
from llada_megatron.tools.bench import Claim, at_least, reported
from llada_megatron.tools.bench.sampling.candidates import DUAL, PresetOnModel, fitted

PRESETS_COMPARED = (DUAL, PresetOnModel("llada2", "block-causal"))
"""One that keeps keys around the block, and the one whose kept keys grow."""


@dataclass
class _Rerun:
    """A pass that is run from Python each time."""

    run: Callable[[], torch.Tensor]
    output: torch.Tensor

    def replay(self) -> None:
        self.output = self.run()


class Rerunner:
    """Captures nothing: passes have the fixed shape that a graph needs, and every one runs its layers from Python."""

    nbytes, left = 0, None

    def record(self, run: Callable[[], torch.Tensor]) -> Recorded:
        """Implements `Recorder.record`."""
        return _Rerun(run, run())


def graph_claims(
    models: dict[str, LoadedModel], prompts: Sequence[list[int]], new_tokens: int, batch_size: int, rounds: int
) -> list[Claim]:
    """Time of a sequence with passes of fixed shape against ordinary ones, and whether the tokens are the same.

    Args:
        models: by their attention.
        prompts: what is to be continued.
        new_tokens: of a continuation.
        batch_size: sequences of a group, besides one at a time.
        rounds: how often all prompts are answered; the least time counts.
    """
    what = "CUDA graphs" if device.cuda_available() else "passes of fixed shape, run from Python,"
    claims = []
    for preset in PRESETS_COMPARED:
        loaded = models[preset.attention]
        reason = obstacle_to("auto", loaded.model) if device.cuda_available() else None
        if reason is not None:
            message(f"{preset.name}: no CUDA graphs, {reason}")
            continue
        for size in dict.fromkeys((1, batch_size)):
            compared = _Comparison(preset, loaded, prompts, new_tokens, size)
            ordinary, fixed = compared.measured(rounds)
            text = f"{preset.name}, batch {size}, {what} against ordinary passes"
            claims.append(reported(f"{text}: time of a sequence", fixed.seconds / ordinary.seconds, "x"))
            claims.append(at_least(f"{text}: same tokens", fixed.agreement(ordinary), "of 1", 1.0))
    return claims


@dataclass(frozen=True)
class _Answers:
    seconds: float
    tokens: dict[int, list[int]]

    def agreement(self, other: _Answers) -> float:
        """Share of the tokens that are the same."""
        pairs = [pair for stream, mine in self.tokens.items() for pair in zip(mine, other.tokens[stream], strict=True)]
        return sum(one == two for one, two in pairs) / len(pairs)


@dataclass(frozen=True)
class _Comparison:
    preset: PresetOnModel
    loaded: LoadedModel
    prompts: Sequence[list[int]]
    new_tokens: int
    batch_size: int

    def measured(self, rounds: int) -> tuple[_Answers, _Answers]:
        """Ordinary passes and those of fixed shape, in turns; of each the round that took least."""
        graphs: Recorder | None = recorder_of("auto", self.loaded.model) or Rerunner()
        turns = [[self._answers(recorder) for recorder in (None, graphs)] for _ in range(rounds)]
        ordinary, fixed = (min(each, key=lambda one: one.seconds) for each in zip(*turns, strict=True))
        return ordinary, fixed

    def _answers(self, recorder: Recorder | None) -> _Answers:
        """Wall time on a GPU, CPU time without one, which other work on the machine changes less."""
        clock = time.perf_counter if device.cuda_available() else time.process_time
        choice = fitted(self.preset, self.loaded)
        model = self.loaded.run.model
        method = choice.method(excluded=[model.mask_token_id], stop_id=model.eos_token_id)
        requests = [
            continuation(prompt, self.new_tokens, choice.block_length, stream, choice.grid)
            for stream, prompt in enumerate(self.prompts)
        ]
        writer = SequenceGenerator(self.loaded, method, self.batch_size, recorder=recorder)
        began = clock()
        found = {each.stream: each.tokens for step in writer.steps(requests) for each in step.finished}
        return _Answers((clock() - began) / len(requests), found)
