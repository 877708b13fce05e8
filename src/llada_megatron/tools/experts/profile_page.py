"""The profile as one HTML page without anything from outside: words, tables, heatmaps as images in the page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.pages.document import document, image_figure, items, paragraph, table
from llada_megatron.pages.heatmaps import data_uri, heatmap, lift, relative
from llada_megatron.tools.experts.expert_profile import ProfileArrays
from llada_megatron.tools.experts.profile_reading import reading

GROUPINGS = {
    "mask_ratio": "Mask ratio",
    "token_class": "Class of the token",
    "position_in_block": "Position in the block",
    "source": "Source of the text",
}
_STYLE = """
.square { display: inline-block; width: 15em; max-width: 100%; margin: .5em }
.key span { display: inline-block; width: 1.2em; height: 1em; border: 1px solid var(--line);
  vertical-align: text-bottom }
"""
_KEY = (
    '<p class="key"><span style="background:#fff"></span> none <span style="background:#7aa0cd"></span> the mean of '
    'the row <span style="background:#be281e"></span> twice the mean and more</p>'
)


def images(profile: dict[str, Any], arrays: ProfileArrays) -> dict[str, bytes]:
    """Every heatmap by the name of its file without the ending; they are in the page, and beside it as PNG files."""
    layers = list(profile["layers"])
    cell = max(1, 512 // profile["experts"])
    found = {"load": heatmap(relative(np.array([profile["layers"][layer]["tokens"] for layer in layers])), cell)}
    for key in GROUPINGS:
        by = profile["by"][key]
        if len(by["names"]) > 1:
            for layer in layers:
                found[f"{key}_layer_{layer}"] = heatmap(relative(np.array(by["tokens"][layer])), cell)
    for layer, together in zip(layers, arrays.together, strict=True):
        found[f"together_layer_{layer}"] = heatmap(lift(together, profile["rows"]), max(1, cell // 2))
    return found


def write_profile(folder: Path, profile: dict[str, Any], drawn: dict[str, bytes]) -> Path:
    """Write page.html, profile.json (see docs/experts.md) and the heatmaps into a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.html").write_text(page(profile, drawn), encoding="utf-8")
    (folder / "profile.json").write_text(json.dumps(profile, ensure_ascii=False), encoding="utf-8")
    for name, image in drawn.items():
        (folder / f"{name}.png").write_bytes(image)
    return folder / "page.html"


def page(profile: dict[str, Any], drawn: dict[str, bytes]) -> str:
    """The page. `drawn`: of `images`."""
    title = f"Experts of {profile['checkpoint']}"
    values = json.dumps(profile, ensure_ascii=False).replace("</", "<\\/")
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        paragraph(_what(profile)),
        "<h2>Reading</h2>",
        items(reading(profile), "reading"),
        *_load(profile, drawn),
        *_groupings(profile, drawn),
        *_together(profile, drawn),
        *_own(profile),
        f'<script type="application/json" id="profile">{values}</script>',
    ]
    return document(title, parts, _STYLE)


def _what(profile: dict[str, Any]) -> str:
    return (
        f"{profile['rows']:,} tokens routed: {profile['tokens']:,} of text at each mask ratio. "
        f"{len(profile['layers'])} layers with {profile['experts']} experts, of which a token takes {profile['top_k']}."
    )


def _load(profile: dict[str, Any], drawn: dict[str, bytes]) -> Iterator[str]:
    yield "<h2>Load</h2>" + _KEY
    yield _figure(drawn["load"], "Layers from top to bottom, experts from left to right.")
    rows = [
        (
            layer,
            f"{facts['max_over_mean']:.2f}",
            f"{facts['variation']:.2f}",
            f"{facts['entropy']:.3f}",
            facts["dead"],
            facts["overloaded"],
            f"{facts['block']['mean']:.1f}",
            f"{facts['block']['covered']:.0%}",
            *(() if "change" not in profile else (f"{profile['change']['layers'][layer]['differ']:.1%}",)),
        )
        for layer, facts in profile["layers"].items()
    ]
    head = ["layer", "busiest / mean", "variation", "entropy", "dead", "overloaded", "experts of a block", "covered"]
    yield table([*head, *(["routed otherwise"] if "change" in profile else [])], rows, "layers")


def _groupings(profile: dict[str, Any], drawn: dict[str, bytes]) -> Iterator[str]:
    for key, name in GROUPINGS.items():
        by = profile["by"][key]
        if len(by["names"]) < 2:
            continue
        yield f"<h2>{name}</h2>"
        names = ", ".join(by["names"])
        for layer in profile["layers"]:
            yield _figure(drawn[f"{key}_layer_{layer}"], f"Layer {layer}. From top to bottom: {names}.")
        yield "<p>Share of the choices of a group that goes to other experts than those of the whole layer:</p>"
        rows = [(layer, *(f"{value:.1%}" for value in values)) for layer, values in by["distance"].items()]
        if len(by["names"]) <= 12:
            yield table(["layer", *by["names"]], rows, key)


def _together(profile: dict[str, Any], drawn: dict[str, bytes]) -> Iterator[str]:
    yield "<h2>Experts that are chosen together</h2>"
    yield "<p>White: never, blue: as often as by chance, red: twice and more.</p>"
    for layer in profile["layers"]:
        yield f'<div class="square">{_figure(drawn[f"together_layer_{layer}"], f"Layer {layer}")}</div>'
    rows = [
        (layer, f"{pair['first']} and {pair['second']}", f"{pair['lift']:.1f}", f"{pair['rows']:,}")
        for layer, facts in profile["layers"].items()
        for pair in facts["pairs"]
    ]
    yield table(["layer", "experts", "times chance", "tokens"], rows, "pairs")


def _own(profile: dict[str, Any]) -> Iterator[str]:
    own = profile["experts_own_tokens"]
    if own is None:
        return
    yield "<h2>Tokens of an expert</h2><p>Visible tokens that it gets more often than a mean expert, and how often.</p>"
    for layer, experts in own.items():
        rows = [
            (str(number), "  ".join(f"{each['text']!r} {each['lift']:.1f}" for each in tokens))
            for number, tokens in enumerate(experts)
            if tokens
        ]
        yield f"<details><summary>Layer {layer}</summary>{table(['expert', 'tokens'], rows, f'own-{layer}')}</details>"


def _figure(image: bytes, caption: str) -> str:
    return image_figure(data_uri(image), caption)
