"""The picture of the reversal benchmark: what each model answers, by how it is asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llada_megatron.llada_moe.evaluation.reversal_figures import ARMS, ROWS, Found, counting, over_seeds

_COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c")
_WIDTH = 0.26
_DRAWN = [row for row in ROWS if row != "forward"]


def draw_reversal(path: Path, found: Found, chance: float) -> bool:
    """Write the picture; False where matplotlib is missing.

    Bars are means over the seeds that count, with one standard error; points are seeds.

    Args:
        path: an SVG file.
        found: the figures.
        chance: percent of the names that a guess would hit.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.5), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for number, (arm, colour) in enumerate(zip(ARMS, _COLOURS, strict=True)):
        for place, row in enumerate(_DRAWN):
            at, each = place + (number - 1) * _WIDTH, over_seeds(found, arm, row)
            if each is None:
                continue
            label = arm if place == 0 else None
            axes.bar(at, each.mean, _WIDTH * 0.9, yerr=each.error, color=colour, alpha=0.75, capsize=3, label=label)
            values = [found[arm][seed][row].right for seed in counting(found)[arm]]
            axes.scatter([at] * len(values), values, s=7, color="black", zorder=3)
    axes.axhline(chance, color="#d62728", linewidth=0.8, linestyle="--", label=f"a name by chance ({chance:g} %)")
    axes.set_xticks(range(len(_DRAWN)), [row.replace(", ", ",\n") for row in _DRAWN])
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, loc="upper right")
    with matplotlib.rc_context({"svg.hashsalt": "reversal"}):  # the same figures give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True
