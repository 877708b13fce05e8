"""What `llada experts` prints beside a profile: agreement of passes, advice, and advice that is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.text_windows import TextWindow, draw_mask
from llada_megatron.parallel.evaluation.pass_agreement import pass_agreement
from llada_megatron.parallel.evaluation.placed_checkpoint import save_weights
from llada_megatron.tools.experts.expert_trial import ExpertTrial

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

Report = tuple[list[str], dict[str, Any]]
"""Lines for people, and JSON values."""

_COMPARED = 16
"""Windows that both passes run."""


def passes(loaded: LoadedModel, windows: Sequence[TextWindow], ratios: Sequence[float]) -> Report:
    """Whether the sampler's pass routes as the training pass does; each window is one document."""
    chosen = list(windows[:_COMPARED])
    length = len(chosen[0].tokens)
    masks = np.stack([draw_mask(length, ratios[n % len(ratios)], (0, n)) for n in range(len(chosen))])
    tokens = np.where(masks, loaded.run.model.mask_token_id, np.stack([window.tokens for window in chosen]))
    found = pass_agreement(loaded, tokens)
    lines = ["layer  other experts  replaced  scores differ by up to  exchanged experts: gap  usual gap"]
    lines += [
        f"{layer:>5}  {each.differ:13.3%}  {each.replaced:8.3%}  {each.score_difference:22.1e}  "
        f"{each.largest_gap:22.1e}  {each.usual_gap:9.1e}"
        for layer, each in found.items()
    ]
    differ = float(np.mean([each.differ for each in found.values()]))
    pairs = sum(each.rows for each in found.values())
    precision = loaded.run.training.precision
    lines.append(f"{differ:.3%} of {pairs:,} (token, layer) pairs are routed otherwise in {precision}")
    layers = {str(layer): asdict(each) for layer, each in found.items()}
    return lines, {"precision": precision, "pairs": pairs, "differ": differ, "layers": layers}


def advice(loaded: LoadedModel, windows: Sequence[TextWindow], ratios: Sequence[float], ranks: Sequence[int]) -> Report:
    """What imbalance costs, what a placement saves, and where a capacity would drop tokens."""
    trial = ExpertTrial(loaded, windows, ratios)
    costs, capacity = trial.costs(ranks), trial.capacity()
    lines = ["ranks  busiest / mean  waiting   placed: busiest / mean  waiting"]
    lines += [
        f"{row['ranks']:>5}  {row['now']['max_over_mean']:14.3f}  {row['now']['lost']:7.1%}   "
        f"{row['placed']['max_over_mean']:22.3f}  {row['placed']['lost']:7.1%}"
        for row in costs
    ]
    lines += [
        "waiting: share of the time of the experts (not of the step) in which a mean rank waits for the busiest, in "
        "passes of one window a rank",
        f"capacity factor without a dropped token: {capacity['without_drops']:.2f}; dropped at "
        + ", ".join(f"{factor:g}: {share:.2%}" for factor, share in capacity["dropped"].items()),
    ]
    best = max(costs, key=lambda row: row["now"]["lost"] - row["placed"]["lost"])
    lines.append(f"to try it: --try placement={best['ranks']} --output FOLDER")
    if trial.moe.expert_bias and trial.moe.num_expert_groups == 1 and not trial.moe.expert_capacity:
        lines.append("to try a bias that evens out the experts: --try bias --output FOLDER")
    return lines, {"ranks": costs, "capacity": capacity}


def trial(
    loaded: LoadedModel, windows: Sequence[TextWindow], ratios: Sequence[float], ranks: int | None, output: str | None
) -> Report:
    """Place the experts for so many ranks, or (None) balance them by a bias; compare, and write the weights where
    `output` says. Raises ConfigError: it cannot be done with this model, or there is something at `output`."""
    target = Path(output) if output else None
    if target is not None and target.exists() and any(target.iterdir()):
        raise ConfigError(f"--output {output}: not empty; name a new directory")
    trials = ExpertTrial(loaded, windows, ratios)
    changed: dict[str, Any]
    if ranks is not None:
        result, orders = trials.try_placement(ranks)
        changed = {"placement": {str(layer): order for layer, order in orders.items()}, "ranks": ranks}
    else:
        result, biases = trials.try_bias()
        changed = {"bias": {str(layer): [float(b) for b in each.bias] for layer, each in biases.items()}}
    lines = [
        result.what,
        f"  before    {result.before:.3f}",
        f"  expected  {result.expected:.3f}  (simulated on one half of the text)",
        f"  measured  {result.measured:.3f}  (on the other half, {result.error:.1%} from what was expected)",
    ]
    if result.gain_error is not None:
        lines.append(f"  the measured gain is {result.gain_error:.1%} from the expected gain")
    if target is not None:
        lines.append(f"weights: {save_weights(loaded, target, changed)}; start a run from them with checkpoint.load")
    return lines, asdict(result) | {"error": result.error, "gain_error": result.gain_error} | changed
