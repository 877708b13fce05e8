"""What `llada bench sample` states of the candidates' figures: their speed at equal quality, and equal tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llada_megatron.tools.bench import Claim, at_least, at_most, reported
from llada_megatron.tools.bench.sampling.candidates import (
    DECODING,
    DUAL,
    LLADA,
    NO_EDITOR,
    SPECULATION,
    TORCHS,
    WHOLE,
    PeerCandidates,
)
from llada_megatron.tools.bench.sampling.figures import Figures, same_tokens

SPEED_GOAL, DUAL_TIME_GOAL, SPECULATION_GOAL = 20.0, 0.65, 2.5
QUALITY_LOSS = 0.02
"""Right sentences that a preset of equal quality may lack, as a share of all."""


def speed_claims(
    alone: dict[str, Figures], together: dict[str, Figures], equal: Sequence[str], reference: Figures
) -> list[Claim]:
    """How much faster the fastest preset at equal quality is than the reference."""
    name = reference.candidate.name
    claims = [
        reported(f"sentences that are right, {name}", reference.right, ""),
        reported(f"CPU seconds of a sequence, {name}", reference.seconds, "s"),
    ]
    kind = f"fastest preset at equal quality (at most {QUALITY_LOSS:g} less)"
    if not equal:
        return [*claims, at_least(f"{kind}: there is none", float("nan"), "x", SPEED_GOAL)]
    best = alone[equal[0]]
    claims.append(
        at_least(
            f"{kind}, {equal[0]}, one at a time: times as fast as {name}",
            reference.seconds / best.seconds,
            "x",
            SPEED_GOAL,
        )
    )
    own = alone[LLADA.name + WHOLE]
    if own is not reference:
        claims.append(
            reported(f"{equal[0]}: times as fast as our own {own.candidate.name}", own.seconds / best.seconds, "x")
        )
    fitting = [each for each in together.values() if each.right >= reference.right - QUALITY_LOSS]
    if fitting:
        fastest = min(fitting, key=lambda each: each.seconds)
        text = f"{kind} in batches, {fastest.candidate.name}: times as fast as {name}"
        claims.append(at_least(text, reference.seconds / fastest.seconds, "x", SPEED_GOAL))
    return [*claims, reported(f"{equal[0]}: sentences that are right", best.right, "")]


def peer_claims(alone: dict[str, Figures], peers: PeerCandidates) -> list[Claim]:
    """The presets against other projects' own code: the same tokens, and in what time."""
    same = "sequences with the same tokens"
    own, theirs, name = alone[LLADA.name + WHOLE], alone[peers.fixed_steps.name], peers.fixed_steps.name
    claims = [
        at_least(f"fixed steps: {same} as {name}", same_tokens(own, theirs), "", 1.0),
        reported(f"fixed steps: CPU time / that of {name}", own.seconds / theirs.seconds, "x"),
    ]
    dual, theirs = alone.get(DUAL.name + WHOLE), alone[peers.dual_cache.name]
    if dual:
        text, torchs = f"CPU time / that of {peers.dual_cache.name}", alone[DUAL.name + WHOLE + TORCHS]
        ratio = dual.seconds / theirs.seconds
        claims += [
            at_least(f"{DUAL.name}: {same} as {peers.dual_cache.name}", same_tokens(dual, theirs), "", 1.0),
            at_most(f"{DUAL.name}, the same whole window: {text}", ratio, "x", DUAL_TIME_GOAL),
            reported(f"the same with torch's own matrix products: {text}", torchs.seconds / theirs.seconds, "x"),
            reported(f"the same with an early stop: {text}", alone[DUAL.name].seconds / theirs.seconds, "x"),
        ]
    return claims


def speculation_claims(alone: dict[str, Figures]) -> list[Claim]:
    """Whether self-speculation writes what the same model decodes token by token, and in how many passes."""
    if not {SPECULATION.name, DECODING.name} <= alone.keys():
        return []
    drafted, decoded = alone[SPECULATION.name], alone[DECODING.name]
    name = SPECULATION.name
    same = same_tokens(drafted, decoded)
    return [
        at_least(f"{name}: sequences with the same tokens as token-by-token greedy decoding", same, "", 1.0),
        at_least(
            f"{name}: tokens per forward pass, drafting and verifying",
            1 / drafted.forwards_per_token,
            "",
            SPECULATION_GOAL,
        ),
        reported(f"{name}: times as fast as token by token", decoded.seconds / drafted.seconds, "x"),
        reported(f"{name}: sentences that are right", drafted.right, ""),
    ]


def stop_claims(alone: dict[str, Figures], end: int) -> list[Claim]:
    """Whether an early stop leaves the tokens up to the end of text as they are."""
    claims, same = [], "sequences with the same tokens"
    for name in (LLADA.name, DUAL.name):
        if name in alone and name + WHOLE in alone:
            share = same_tokens(alone[name], alone[name + WHOLE], end)
            claims.append(at_least(f"{name}: {same} up to the end of text with an early stop", share, "", 1.0))
    return claims


def batch_claims(alone: dict[str, Figures], together: dict[str, Figures]) -> list[Claim]:
    """What a batch gains over one sequence at a time, and whether its tokens stay the same."""
    claims = []
    for name, batch in together.items():
        single = alone[name.rpartition(", batch ")[0]]
        claims.append(reported(f"{name}: times as fast as one at a time", single.seconds / batch.seconds, "x"))
        claims.append(reported(f"{name}: sequences with the same tokens as alone", same_tokens(batch, single), ""))
    return claims


def edit_claims(alone: dict[str, Figures]) -> list[Claim]:
    """What editing brings: each preset that edits against its own schedule without an editor, on the same model."""
    claims = []
    for name, edited in alone.items():
        plain = alone.get(name + NO_EDITOR)
        if plain is not None:
            gained, passes = edited.right - plain.right, edited.forwards / plain.forwards
            claims.append(reported(f"{name}: share of right sentences gained by editing", gained, ""))
            claims.append(reported(f"{name}: forward passes / those without editing", passes, "x"))
    return claims
