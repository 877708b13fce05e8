"""A profile in words: what stands out, with the figures it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

EVEN, SMALL, CLEAR = 1.3, 0.05, 2.0
"""A busiest expert below so many times the mean is even. A distance of loads below the second, or below so many times
what chance makes of so few tokens, is none."""


def reading(profile: dict[str, Any]) -> list[str]:
    """Sentences about a profile of `expert_profile`, the most urgent first."""
    return [*_balance(profile), *_groups(profile), *_blocks(profile), *_pairs(profile), *_change(profile)]


def _balance(profile: dict[str, Any]) -> Iterator[str]:
    layers, experts = profile["layers"], profile["experts"]
    dead = {layer: [e for e, n in enumerate(facts["tokens"]) if n == 0] for layer, facts in layers.items()}
    dead = {layer: found for layer, found in dead.items() if found}
    if dead:
        count = sum(map(len, dead.values()))
        shown = "; ".join(f"layer {layer}: {_some(found)}" for layer, found in list(dead.items())[:6])
        more = f"; and in {len(dead) - 6} more layers" if len(dead) > 6 else ""
        yield (
            f"{count} of {experts * len(layers)} experts received no token of this text ({shown}{more}). They cost "
            "memory and learn nothing. Where routers have biases, `llada experts … --try bias` looks for some that "
            "bring them back; training needs model.moe.expert_bias_update_rate or model.moe.aux_loss_coefficient, "
            "or they die again. Or the text is of another kind than the training text."
        )
    else:
        yield f"Every one of the {experts} experts of each of the {len(layers)} layers received tokens."
    worst = max(layers, key=lambda layer: layers[layer]["max_over_mean"])
    facts = layers[worst]
    over = sum(layer["overloaded"] for layer in layers.values())
    if facts["max_over_mean"] < EVEN:
        yield f"The load is even: the busiest expert of any layer has {facts['max_over_mean']:.2f} times the mean."
    else:
        busiest = max(range(experts), key=lambda e: facts["tokens"][e])
        yield (
            f"Layer {worst} is the least even: expert {busiest} gets {facts['max_over_mean']:.2f} times the mean "
            f"(normalised entropy {facts['entropy']:.3f}). In all layers {over} experts get more than twice the mean."
        )


def _groups(profile: dict[str, Any]) -> Iterator[str]:
    words = {
        "mask_ratio": "mask ratio",
        "token_class": "class of the token",
        "position_in_block": "position in the block",
        "source": "source of the text",
    }
    for key, name in words.items():
        by = profile["by"][key]
        if len(by["names"]) < 2:
            continue
        clear = [
            (value, layer, by["names"][group])
            for layer, values in by["distance"].items()
            for group, value in enumerate(values)
            if value >= max(SMALL, CLEAR * by["chance"][layer][group])
        ]
        if not clear:
            yield f"The {name} changes no layer's load by more than chance and {SMALL:.0%} of the choices."
        else:
            value, layer, group = max(clear)
            yield f"The {name} matters most in layer {layer}: at {group!r}, {value:.0%} of the choices go elsewhere."


def _blocks(profile: dict[str, Any]) -> Iterator[str]:
    sets = {layer: facts["block"] for layer, facts in profile["layers"].items() if facts["block"]["blocks"]}
    if not sets:
        yield f"No document fills a block of {profile['block_size']} tokens."
        return
    mean = sum(block["mean"] for block in sets.values()) / len(sets)
    covered = sum(block["covered"] for block in sets.values()) / len(sets)
    first = next(iter(sets.values()))
    capacity = first["capacity"]
    saved = (
        f"with block routing at this capacity a block loads {capacity} instead of {mean:.1f}, and {1 - covered:.0%} of "
        "the choices move"
        if mean > capacity
        else "block routing at this capacity would save nothing"
    )
    yield (
        f"A block of {profile['block_size']} tokens touches {mean:.1f} of {profile['experts']} experts in a layer "
        f"(random choices would touch {first['even']:.1f}): so many a block sampler must load. The {capacity} most "
        f"chosen of a block hold {covered:.0%} of its choices: {saved}."
    )


def _pairs(profile: dict[str, Any]) -> Iterator[str]:
    pairs = [(pair["lift"], layer, pair) for layer, facts in profile["layers"].items() for pair in facts["pairs"]]
    if pairs:
        lift, layer, pair = max(pairs, key=lambda each: each[0])
        yield (
            f"Chosen together most, against chance: experts {pair['first']} and {pair['second']} of layer {layer} "
            f"({lift:.1f} times). On one rank they save a message for each token that takes both."
        )


def _change(profile: dict[str, Any]) -> Iterator[str]:
    change = profile.get("change")
    if change:
        layer = max(change["layers"], key=lambda each: change["layers"][each]["differ"])
        facts = change["layers"][layer]
        mean = sum(each["differ"] for each in change["layers"].values()) / len(change["layers"])
        yield (
            f"Against {change['against']}, {mean:.0%} of the (token, layer) pairs have another set of experts; most in "
            f"layer {layer} ({facts['differ']:.0%}, where {facts['experts']:.0%} of the experts were replaced)."
        )


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, … ({len(numbers)})"
