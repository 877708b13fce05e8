"""`llada bench train`: the training step against transformers' model of the same size, and against the matmul peak.

Both sides train in fp32 on the same batches with the same number of threads in the same process, in turns; figures are
medians over the turns, ratios the median of each turn's ratio. Each side runs its own whole step: forward, backward,
clipping, AdamW. The sizes keep the published proportions (LLaMA's width to depth; LLaDA-MoE's and OLMoE's 64 experts of
which 8 run, half as wide as the model) at 27-31 million parameters. The vocabulary is small, so that the logits of
unmasked rows, which only the other side computes, weigh about what they do in a large model; a row of the result says
what remains of the difference without them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.model.flops import FORMULA, flops_per_token
from llada_megatron.tools.bench import Claim, at_least, reported

if TYPE_CHECKING:
    from collections.abc import Callable

    from llada_megatron.tools.bench.our_step import MaskedBatch

SEQUENCES, LENGTH, MASKED_SHARE = 4, 512, 0.5
LEARNING_RATE, CLIP = 1e-4, 1.0
GOALS = {"dense": 1.0, "moe": 1.2}
PEER_NAMES = {"dense": "LLaMA", "moe": "OLMoE"}

_COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "max_sequence_length": LENGTH,
    "mask_token_id": 3,
    "eos_token_id": 2,
    "head_dim": 64,
}
MODELS = {
    "dense": ModelConfig(
        family="llada",
        num_layers=6,
        hidden_size=512,
        ffn_hidden_size=1408,
        num_attention_heads=8,
        num_key_value_heads=8,
        **_COMMON,
    ),
    "moe": ModelConfig(
        family="llada_moe",
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_norm=True,
        moe=MoEConfig(num_experts=64, top_k=8, expert_ffn_hidden_size=128),
        **_COMMON,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to measure."""
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side, after one to warm up (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default 1, as a rank has)")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both", help="which comparison (default both)")


@dataclass
class Turns:
    """Seconds per step of every candidate, turn by turn, and the peak measured beside each turn."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)

    def ratios(self, over: str) -> list[float]:
        """How many times the tokens/s of `over` ours has, turn by turn."""
        return [b / a for a, b in zip(self.seconds["ours"], self.seconds[over], strict=True)]

    def speedup(self, over: str) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios(over))

    def tokens_per_second(self, name: str, tokens: int) -> float:
        """Median over the turns."""
        return tokens / statistics.median(self.seconds[name])

    def utilization(self, name: str, flops: float) -> float:
        """Model FLOPs of a step over what the peak would have done in the same time: median over the turns."""
        return statistics.median(flops / (s * p) for s, p in zip(self.seconds[name], self.peaks, strict=True))


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures the chosen models, prints their profiles, and returns the claims."""
    import torch

    from llada_megatron.tools.bench.measurement import single_process
    from llada_megatron.tools.bench.transformers_step import build_peer

    torch.set_num_threads(args.threads)
    if os.getloadavg()[0] > 1:
        message("other processes keep this machine busy: figures scatter, most of all with several threads")
    names = list(MODELS) if args.model == "both" else [args.model]
    build_peer(MODELS["dense"], LENGTH)  # a missing package is said before anything long starts
    claims: list[Claim] = []
    with single_process():
        for name in names:
            claims += _compare(name, args.repeats)
    print(f"\n{FORMULA}\n", flush=True)
    return claims


def _compare(name: str, repeats: int) -> list[Claim]:
    from llada_megatron.tools.bench.measurement import breakdown, format_breakdown

    model, peer_name = MODELS[name], PEER_NAMES[name]
    candidates, implementation = _candidates(name)
    turns = _take_turns(candidates, model, repeats)
    ratios = turns.ratios("peer")
    message(f"{name}: the turns' ratios lie between {min(ratios):.2f} and {max(ratios):.2f}")
    batch = _batch(model, seed=0)
    profiles = {side: breakdown(lambda side=side: candidates[side](batch)) for side in ("ours", "peer")}
    print(f"\n{name}: where a step's time goes (own time of the operators)")
    print(format_breakdown({"ours": profiles["ours"], peer_name: profiles["peer"]}))
    print(f"{_step_flops(model) / 1e9:.1f} GFLOP a step (s = {MASKED_SHARE}, K = {LENGTH})", flush=True)
    return _claims(name, turns, profiles["ours"], f"{peer_name}{implementation}")


def _candidates(name: str) -> tuple[dict[str, Callable[[MaskedBatch], float]], str]:
    """The steps to compare, and which experts implementation is the peer's fastest."""
    from llada_megatron.tools.bench.our_step import OurStep, run_config
    from llada_megatron.tools.bench.transformers_step import TransformersStep, build_peer

    model = MODELS[name]
    ours = OurStep(run_config(model, SEQUENCES, LENGTH, LEARNING_RATE, CLIP))
    implementation = _fastest_experts(model) if model.moe else None
    other = TransformersStep(build_peer(model, LENGTH, implementation), LEARNING_RATE, CLIP)
    rows_only = TransformersStep(build_peer(model, LENGTH, implementation), LEARNING_RATE, CLIP, rows_only=True)
    mine, theirs = (sum(p.numel() for p in m.parameters()) for m in (ours.chunk, other.model))
    message(f"{name}: {mine:,} parameters, {PEER_NAMES[name]} {theirs:,}; {SEQUENCES} sequences of {LENGTH}, fp32")
    if abs(mine - theirs) > 1e-3 * mine:
        raise RuntimeError(f"the two {name} models differ in size: {mine} and {theirs} parameters")
    steps = {"ours": ours.step, "peer": other.step, "peer, masked rows only": rows_only.step}
    return steps, f" ({implementation} experts)" if implementation else ""


def _fastest_experts(model: ModelConfig) -> str:
    """Tries transformers' experts implementations that fit into memory for two steps each."""
    import psutil

    from llada_megatron.tools.bench.transformers_step import (
        EXPERTS_IMPLEMENTATIONS,
        TransformersStep,
        build_peer,
        feasible_implementations,
    )

    names = feasible_implementations(model, SEQUENCES * LENGTH, psutil.virtual_memory().available)
    best: dict[str, float] = {}
    for name in names:
        candidate = TransformersStep(build_peer(model, LENGTH, name), LEARNING_RATE, CLIP)
        best[name] = min(_seconds(candidate.step, _batch(model, seed)) for seed in range(3))
    for name in EXPERTS_IMPLEMENTATIONS:
        message(f"OLMoE {name}: " + (f"{best[name]:.2f} s a step" if name in best else "needs too much memory here"))
    return min(best, key=lambda name: best[name])


def _take_turns(candidates: dict[str, Callable[[MaskedBatch], float]], model: ModelConfig, repeats: int) -> Turns:
    import torch

    from llada_megatron.parallel import device
    from llada_megatron.parallel.training.peak import matmul_peak

    turns = Turns({name: [] for name in candidates})
    for turn in range(repeats + 1):
        batch = _batch(model, seed=turn)
        order = list(candidates)[turn % len(candidates) :] + list(candidates)[: turn % len(candidates)]
        seconds = {name: _seconds(candidates[name], batch) for name in order}  # each side goes first in its turn
        if turn == 0:
            continue  # warm-up: allocations, threads, the optimizers' state
        turns.peaks.append(matmul_peak(device.current(), torch.float32))
        for name, value in seconds.items():
            turns.seconds[name].append(value)
        message(f"turn {turn}/{repeats}: " + "  ".join(f"{name} {seconds[name]:.2f} s" for name in candidates))
    return turns


def _seconds(step: Callable[[MaskedBatch], float], batch: MaskedBatch) -> float:
    start = time.perf_counter()
    step(batch)  # returns a number, so the device has finished
    return time.perf_counter() - start


def _batch(model: ModelConfig, seed: int) -> MaskedBatch:
    from llada_megatron.tools.bench.our_step import masked_batch

    return masked_batch(model, SEQUENCES, LENGTH, seed)


def _step_flops(model: ModelConfig) -> float:
    return SEQUENCES * LENGTH * flops_per_token(model, LENGTH, supervised_share=MASKED_SHARE).total


def _claims(name: str, turns: Turns, profile: dict[str, float], peer_name: str) -> list[Claim]:
    tokens, flops = SEQUENCES * LENGTH, _step_flops(MODELS[name])
    against = f"{name}: tokens/s of a training step against transformers' {peer_name}"
    rows_only = turns.speedup("peer, masked rows only")
    return [
        at_least(against, turns.speedup("peer"), "x", GOALS[name]),
        reported(f"{against}, had it the output layer on masked rows only", rows_only, "x"),
        reported(f"{name}: tokens/s", turns.tokens_per_second("ours", tokens), "tokens/s"),
        reported(f"{name}: tokens/s of transformers' {peer_name}", turns.tokens_per_second("peer", tokens), "tokens/s"),
        reported(f"{name}: measured matmul peak", statistics.median(turns.peaks) / 1e9, "GFLOP/s"),
        reported(f"{name}: model-FLOPs utilisation of the peak", 100 * turns.utilization("ours", flops), "%"),
        reported(f"{name}: the same of transformers' {peer_name}", 100 * turns.utilization("peer", flops), "%"),
        *(reported(f"{name}: share of the step, {kind}", 100 * share, "%") for kind, share in profile.items()),
    ]
