"""Ling 2.0: inclusionAI/Ling-mini-2.0 and -flash-2.0, autoregressive parents of LLaDA2. Imported only.

Source: the published configuration of Ling-mini-2.0, and what Megatron-Bridge reads as `bailing_moe_v2`. Tensors and
keys are those of LLaDA2, and the vocabulary has its mask token. Layers for the prediction of further tokens have the
numbers after those of the others, and are skipped. The published files say `bailing_moe`, as do those of the older
Ling, which is another architecture.
"""

from __future__ import annotations

import dataclasses
import re

from llada_megatron.llada_moe.huggingface.formats import llada2
from llada_megatron.llada_moe.huggingface.formats.table import Config, Format, is_rotary_buffer

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _ignores(config: Config, name: str) -> bool:
    """Whether a tensor belongs to a layer that predicts further tokens, or holds rotary frequencies."""
    layer = _LAYER.match(name)
    first = config["num_hidden_layers"]
    further = range(first, first + (config.get("num_nextn_predict_layers") or 0))
    return is_rotary_buffer(config, name) or (layer is not None and int(layer[1]) in further)


BAILING_V2 = Format(
    name="bailing_moe_v2",
    title="Ling 2.0 (mini and flash; autoregressive)",
    model_type="bailing_moe_v2",
    names=llada2.NAMES,
    fields=llada2.FIELDS,
    left_out={**llada2.LEFT_OUT, "moe_router_enable_expert_bias": False, "use_qk_norm": False},
    accepted={**llada2.ACCEPTED, "expert_capacity": (0,)},
    reasons={"expert_capacity": "no parent is known to route by blocks"},
    implied=llada2.IMPLIED,
    void=lambda config: ("block_size",),
    ignores=_ignores,
    counts=(*llada2.COUNTS, "num_nextn_predict_layers"),
    obstacle=llada2.other_group_score,
    autoregressive=True,
    why_not_exported="models of this architecture are exported as LLaDA2",
)
BAILING = dataclasses.replace(BAILING_V2, name="bailing_moe", model_type="bailing_moe", marker="n_group")
