"""The model card of an export, and its `generation_config.json`: written from the model and the checkpoint's metadata.

The same checkpoint gives the same card. Of paths on the machine that trained it, the card shows only the last names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from llada_megatron.llada_moe.config import RunConfig, from_dict
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig
from llada_megatron.llada_moe.huggingface.formats.table import Format
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.llada_moe.objectives import Objective, checkpoint_objective, make_objective, trained_objective

Row = tuple[str, str]
"""Name and value."""

_ROUTING = {
    "softmax": "softmax over all experts",
    "softmax_normalized": "softmax, divided by the sum over the chosen experts",
    "sigmoid": "sigmoid, divided by the sum over the chosen experts",
}
_PLACES = re.compile(r"checkpoints|step-\d+")
"""Names of directories of a run, which need the name of the run before them."""


def generation_config(model: ModelConfig, objective: ObjectiveConfig, unused: Sequence[int] = ()) -> dict[str, Any]:
    """What programs for sampling read of the model, as `generation_config.json` names it.

    Args:
        objective: what the weights were trained for, which decides the attention.
        unused: ids that the tokenizer has no token for.
    """
    operations = [i for i in (model.delete_token_id, model.insert_token_id) if i is not None]
    config: dict[str, Any] = {
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.eos_token_id,
        "mask_token_id": model.mask_token_id,
        "attention_pattern": _kind(make_objective(objective)),
    }
    if objective.block_size is not None:
        config["block_length"] = objective.block_size
    suppressed = sorted({*operations, *unused} - {model.mask_token_id})
    return config | ({"suppress_tokens": suppressed} if suppressed else {})


def model_card(model: ModelConfig, table: Format, metadata: dict[str, Any], tokenizer: bool = True) -> str:
    """The text of `README.md`.

    Args:
        table: format of the export.
        metadata: what the checkpoint's manifest says of the run.
        tokenizer: whether the export has a tokenizer that AutoTokenizer reads.
    """
    run = from_dict(RunConfig, metadata["run"])
    trained = trained_objective(run, metadata)
    kind = _kind(make_objective(trained))
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [table.name, "custom_code", *_TAGS.get(kind, ["masked-diffusion"])],
    }
    what = {"causal": "An autoregressive", "joint": "An autoregressive and block diffusion"}.get(
        kind, "A masked diffusion"
    )
    sections = (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {what} language model in the format of {table.title}",
        "## Architecture",
        _rows(_architecture(model)),
        "## Training",
        _training(run, metadata),
        "## Use",
        _USE.format(
            classes="AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM",
            text=_TEXT if tokenizer else _IDS,
            call=_call(kind, table, trained.block_size or 32),
        ),
        "## Attention",
        _ATTENTION[kind].format(block=trained.block_size),
    )
    return "\n\n".join(sections) + "\n"


def _call(kind: str, table: Format, block: int) -> str:
    """The lines of the example that sample, or that give the next token of a model that predicts it."""
    if kind in ("causal", "joint"):
        return _NEXT
    assert table.exports is not None
    return _GENERATE.format(
        block=block,
        new=2 * block,
        steps=block if table.exports.by_threshold else 2 * block,
        more=", threshold=0.95, eos_early_stop=True" if table.exports.by_threshold else "",
        answer="tokens[0]" if table.exports.by_threshold else "tokens[0, text.shape[1]:]",
    )


def _kind(objective: Objective) -> str:
    if objective.verifies:
        return "joint"
    if not objective.fills_masks:
        return "causal"
    return "full" if objective.config.block_size is None else "blocks"


def _rows(rows: Iterator[Row]) -> str:
    """A Markdown table of two columns; characters that would end a cell are escaped."""
    lines = [f"| {what} | {value.replace('|', chr(92) + '|')} |" for what, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _architecture(model: ModelConfig) -> Iterator[Row]:
    parameters = count_parameters(model)
    yield "parameters", f"{parameters.total:,}"
    if model.moe is not None:
        yield "of these active for a token", f"{parameters.active:,}"
    yield "layers", f"{model.num_layers}"
    yield "hidden size", f"{model.hidden_size:,}"
    heads = f"{model.num_attention_heads} for queries, {model.num_key_value_heads} for keys and values"
    yield "attention heads", f"{heads}, {model.head_dim} features each" + (", normalised" if model.qk_norm else "")
    part = "" if model.rotary_fraction == 1 else f", over {model.rotary_fraction:g} of each head"
    yield "rotary embedding", f"base {model.rope_theta:g}{part}"
    if model.moe is None:
        yield "feed-forward", f"SwiGLU, width {model.ffn_hidden_size:,}"
    else:
        yield from _experts(model, model.moe)
    yield "vocabulary", f"{model.vocab_size:,}" + (", embedding and output tied" if model.tie_embeddings else "")
    yield "longest sequence", f"{model.max_sequence_length:,} tokens"
    yield "mask, end-of-text and padding tokens", f"{model.mask_token_id}, {model.eos_token_id}, {model.eos_token_id}"


def _experts(model: ModelConfig, moe: MoEConfig) -> Iterator[Row]:
    yield "experts", f"{moe.num_experts} of width {moe.expert_ffn_hidden_size:,}, {moe.top_k} for each token"
    if moe.shared_expert_ffn_hidden_size:
        yield "shared expert", f"width {moe.shared_expert_ffn_hidden_size:,}"
    if moe.leading_dense_layers:
        yield "dense layers at the bottom", f"{moe.leading_dense_layers} of width {model.ffn_hidden_size:,}"
    groups = f", best {moe.expert_groups_top_k} of {moe.num_expert_groups} groups" if moe.num_expert_groups > 1 else ""
    yield "router", _ROUTING[moe.score_function] + groups + (", bias in the choice" if moe.expert_bias else "")
    if moe.expert_capacity:
        yield (
            "routing by blocks",
            f"{moe.routing_block_size} tokens choose among the same {moe.expert_capacity} experts",
        )


def _training(run: RunConfig, metadata: dict[str, Any]) -> str:
    imported = metadata.get("imported")  # a run that continues from it writes metadata of its own
    if imported:
        origin = f"The weights were read from `{imported['from']}`, in the format {imported['format']}"
        return f"{origin}, and have not been trained since."
    return _rows(_trained(run, metadata)) + "\n\nTrained with llada-megatron on Megatron-Core."


def _trained(run: RunConfig, metadata: dict[str, Any]) -> Iterator[Row]:
    training, optimizer = run.training, run.optimizer
    samples = metadata["consumed_samples"]
    yield "steps", f"{metadata['step']:,} of {training.steps:,}"
    yield "sequences", f"{samples:,}, {training.global_batch_size:,} in each step"
    yield "tokens", f"{samples * training.sequence_length:,} ({training.sequence_length:,} in each sequence)"
    if run.checkpoint.load:
        yield "started from", f"`{_last_names(run.checkpoint.load)}`"
    objective = make_objective(run.objective)
    begun = objective.fills_masks and not checkpoint_objective(run, metadata).fills_masks
    yield "objective", objective.description() + ("; so far only next tokens" if begun else "")
    clipping = f", gradient norm at most {optimizer.clip_grad_norm:g}" if optimizer.clip_grad_norm else ""
    decay = f"weight decay {optimizer.weight_decay:g}"
    yield "optimizer", f"AdamW, betas {optimizer.beta1:g} and {optimizer.beta2:g}, {decay}{clipping}"
    yield "learning rate", _learning_rate(optimizer.learning_rate)
    yield "precision", training.precision
    yield "data", ", ".join(f"`{PurePath(data.path).name}` (weight {data.weight:g})" for data in run.data.sets)
    yield "seed", f"{training.seed}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())


def _last_names(path: str) -> str:
    """The end of a path from the name of the run on, if it is one of a directory in a run, else its last name."""
    names = [name for name in PurePath(path).parts if name != PurePath(path).anchor]
    first = len(names) - 1
    while first > 0 and _PLACES.fullmatch(names[first]):
        first -= 1
    return "/".join(names[max(first, 0) :])


def _learning_rate(rate: LearningRateConfig) -> str:
    parts = [f"{rate.peak:g} after {rate.warmup_steps:,} steps"]
    parts += [f"{drop.value:g} from step {drop.step:,}" for drop in rate.drops]
    if rate.decay_steps:
        parts.append(f"{rate.decay_shape} to {rate.final:g} over the last {rate.decay_steps:,}")
    return ", ".join(parts)


_TAGS = {"causal": ["autoregressive"], "joint": ["autoregressive", "masked-diffusion"]}
_USE = """The files beside this one are code, so they have to be trusted:

```python
import torch
from transformers import {classes}

directory = "."
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
{text}
{call}
```

`llada convert import` makes a checkpoint of it that `llada train` and `llada sample` read."""

_TEXT = """tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
text = tokenizer("def add(a, b):\\n", add_special_tokens=False, return_tensors="pt")["input_ids"]"""
_IDS = "text = torch.arange(10)[None]  # put the ids of a text here: there is no tokenizer in this directory"
_GENERATE = """tokens = model.generate(text, gen_length={new}, block_length={block}, steps={steps}{more})
answer = {answer}  # up to {new} new tokens"""
_NEXT = """seen = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool).tril()
logits = model(text, attention_mask=seen[None, None]).logits
guess = logits[0, -1].argmax()  # of the token that comes next"""
_ATTENTION = {
    "full": """Every token sees every other one: there is no causal mask, and the logits of a position are those of its
own token. Give padding as a 2-D `attention_mask`.""",
    "blocks": """The weights were trained with block-causal attention: a token sees its own block of {block} positions,
counted from the start of the text, and all blocks before it. `generate` does that by itself; of other calls, give the
pattern as a 4-D `attention_mask`, or the model attends to everything, which is not what it learnt. A 2-D mask means
padding. The logits of a position are those of its own token.""",
    "joint": """**The weights were trained for two things at once**: with causal attention, on the next token; and to
fill blocks of {block} masks behind a text that is read causally. The code beside this file gives the next token with a
causal 4-D `attention_mask` (above). Its `generate` fills blocks that see each other whole, which is not what these
weights learnt, and refuses. Imported again, `llada sample --preset self-speculation` drafts blocks and verifies them:
it writes what decoding token by token writes, in fewer passes; `--preset llada2` fills blocks by diffusion.""",
    "causal": """**The weights were trained autoregressively**: with causal attention, on the next token. They are no
diffusion model yet, but a start for one. The code beside this file attends to everything unless it is given a causal
4-D `attention_mask` (above), and the logits of a position are those of the token after it.""",
}
