"""The card says what the checkpoint knows, and its example runs."""

from __future__ import annotations

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from llada_megatron.llada_moe.config import RunConfig, from_dict, load_model, to_dict
from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, LearningRateDropConfig, OptimizerConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.huggingface.card import generation_config, model_card
from llada_megatron.llada_moe.huggingface.formats import export_format
from llada_megatron.llada_moe.objectives import trained_objective
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.joint import JointConfig

OBJECTIVES = {
    "full": ObjectiveConfig(),
    "blocks": ObjectiveConfig(block_size=32),
    "causal": ObjectiveConfig(kind="autoregressive"),
    "joint": JointConfig(kind="joint", block_size=32),
}


def metadata(model, step=750, objective=None, load="/home/someone/parent/checkpoints/step-00000000", **more):
    run = RunConfig(
        model=model,
        training=TrainingConfig(steps=1000, sequence_length=4096, global_batch_size=64, seed=5),
        data=DataConfig(sets=[DataSetConfig(path="/home/someone/data/py|thon", weight=2.0)]),
        optimizer=OptimizerConfig(
            learning_rate=LearningRateConfig(
                peak=4e-4, warmup_steps=20, drops=[LearningRateDropConfig(step=500, value=1e-4)], decay_steps=100
            )
        ),
        output_dir="/home/someone/runs/mine",
        objective=objective or ObjectiveConfig(),
        checkpoint=CheckpointConfig(load=load),
    )
    versions = {"llada-megatron": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"}
    return {"model": to_dict(model), "run": to_dict(run), "step": step, "consumed_samples": step * 64,
            "versions": versions, **more}  # fmt: skip


def card(name="llada2-mini", tokenizer=True, objective_state=None, **known):
    model = load_model(name)
    facts = metadata(model, **known) | {"objective": objective_state or {}}
    return model_card(model, export_format(model), facts, tokenizer)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llada-8b", "llada-moe-7b-a1b", "llada2-flash"])
def test_the_card_is_markdown_with_a_front_matter(name, objective):
    text = card(name, objective=OBJECTIVES[objective])
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert re.findall("^#+ .*", body, re.M)[1:] == ["## Architecture", "## Training", "## Use", "## Attention"]
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)
    assert not re.search(r"[{}]|None|/home|someone", re.sub(r"```.*?```", "", body, flags=re.S))
    assert max(map(len, body.splitlines())) < 160


def test_what_the_checkpoint_knows_is_told():
    text = card(objective=OBJECTIVES["blocks"])
    for told in (
        "| parameters | 16,255,643,392 |", "| layers | 20 |", "base 600000, over 0.5 of each head",
        "16 for queries, 4 for keys and values, 128 features each, normalised", "256 of width 512, 8 for each token",
        "| dense layers at the bottom | 1 of width 5,120 |", "| mask, end-of-text and padding tokens | 156895, ",
        "sigmoid, divided by the sum over the chosen experts, best 4 of 8 groups, bias in the choice",
        "| steps | 750 of 1,000 |", "| sequences | 48,000, 64 in each step |",
        "| tokens | 196,608,000 (4,096 in each sequence) |", "`parent/checkpoints/step-00000000`",
        "betas 0.9 and 0.95, weight decay 0.1, gradient norm at most 1", "`py\\|thon` (weight 2)",
        "0.0004 after 20 steps, 0.0001 from step 500, linear to 0 over the last 100",
        "megatron-core 0.16.1", "block of 32 positions",
    ):  # fmt: skip
        assert told in text, told


def test_imported_weights_have_no_training_of_their_own():
    imported = {"format": "bailing_moe", "from": "Ling-mini-2.0", "config_sha256": "0" * 64}
    text = card(step=0, objective=OBJECTIVES["causal"], imported=imported)
    assert "read from `Ling-mini-2.0`, in the format bailing_moe, and have not been trained since." in text
    assert "| steps |" not in text and "**The weights were trained autoregressively**" in text
    assert "autoregressive" in yaml.safe_load(text.split("---\n")[1])["tags"]


def test_a_run_that_has_only_learnt_next_tokens_so_far():
    staged = BlockDiffusionConfig(
        kind="block_diffusion",
        block_size=32,
        block_schedule=BlockSchedule(autoregressive_tokens=9, stable=BlockStage(block_size=32, tokens=9)),
    )
    text = card(objective=staged, objective_state={"autoregressive": True, "block_size": 1})
    assert "# An autoregressive language model" in text and "**The weights were trained autoregressively**" in text
    assert "| objective | next tokens, then block diffusion in " in text and "; so far only next tokens |" in text
    text = card(objective=staged, objective_state={"stage": 0, "block_size": 32})
    assert "# A masked diffusion language model" in text and "so far" not in text


@pytest.mark.parametrize(
    ("kind", "size", "attention"),
    [
        (BlockDiffusionConfig, 4, "block of 4 positions"),
        (BlockDiffusionConfig, 4096, "Every token sees every other one"),
        (JointConfig, 4, "fill blocks of 4 masks"),
        (JointConfig, 4096, "fill blocks of 4096 masks"),
    ],
)
def test_a_stage_of_a_schedule_is_told_with_its_own_blocks(kind, size, attention):
    staged = kind(
        kind="joint" if kind is JointConfig else "block_diffusion",
        block_size=32,
        block_schedule=BlockSchedule(
            warmup=[BlockStage(block_size=4, tokens=9)],
            stable=BlockStage(block_size=4096, tokens=9),
            decay=[BlockStage(block_size=32, tokens=9)],
        ),
    )
    facts = metadata(load_model("llada2-mini"), objective=staged) | {"objective": {"stage": 0, "block_size": size}}
    trained = trained_objective(from_dict(RunConfig, facts["run"]), facts)
    whole = size == 4096 and kind is BlockDiffusionConfig
    assert generation_config(load_model("llada2-mini"), trained).get("block_length") == (None if whole else size)
    assert attention in " ".join(card(objective=staged, objective_state=facts["objective"]).split())


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/home/alice/llada", "llada"),
        ("/data/llada", "llada"),
        ("/llada", "llada"),
        ("runs/llada/", "llada"),
        ("/home/alice/llada/checkpoints", "llada/checkpoints"),
        ("/checkpoints/step-00000007", "checkpoints/step-00000007"),
        ("../llada/checkpoints/step-00000007", "llada/checkpoints/step-00000007"),
    ],
)
def test_of_a_path_the_last_names_are_told(path, told):
    assert f"| started from | `{told}` |" in card(load=path)


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_the_example_runs(name, objective, tokenizer, monkeypatch):
    """With a stub for transformers; tests/tools/convert/test_generation.py runs `generate` itself."""
    text = card(name, tokenizer, objective=OBJECTIVES[objective])
    assert ("AutoTokenizer" in text) == tokenizer
    example = re.search(r"```python\n(.*?)```", text, re.S)[1]
    given, calls = (40 if tokenizer else 10), []

    class Model:
        def __call__(self, tokens, attention_mask):
            calls.append((tokens, attention_mask))
            return SimpleNamespace(logits=torch.nn.functional.one_hot(tokens, 256).float())

        def generate(self, tokens, **settings):
            calls.append((tokens, settings))
            new = torch.full((1, settings["gen_length"]), 7)
            return new if "threshold" in settings else torch.cat([tokens, new], 1)

    loaded = SimpleNamespace(eval=Model)
    encode = lambda text, **_: {"input_ids": torch.arange(given)[None]}  # noqa: E731
    stub = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda directory, trust_remote_code: loaded),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda directory, trust_remote_code: encode),
    )
    monkeypatch.setitem(sys.modules, "transformers", stub)
    scope = {}
    exec(example, scope)
    ((tokens, settings),) = calls
    assert tokens.shape == (1, given)
    if objective in ("causal", "joint"):
        assert torch.equal(settings[0, 0], torch.ones(given, given, dtype=torch.bool).tril())
        return
    assert settings["block_length"] == 32 and settings["gen_length"] == 64
    assert settings["steps"] == (64 if name == "tiny-dense" else 32) and ("threshold" in settings) == (
        name == "tiny-moe"
    )
    assert scope["answer"].tolist() == [7] * 64


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_generation_config_is_read_by_transformers(objective):
    model = dataclasses.replace(load_model("tiny-dense"), mask_token_id=9)
    known = generation_config(model, OBJECTIVES[objective], unused=[254, 9, 255])
    expected = {
        "eos_token_id": model.eos_token_id, "pad_token_id": model.eos_token_id, "mask_token_id": 9,
        "attention_pattern": objective, "suppress_tokens": [254, 255],
    }  # fmt: skip
    assert known == expected | ({"block_length": 32} if objective in ("blocks", "joint") else {})
    transformers = pytest.importorskip("transformers")
    read = transformers.GenerationConfig.from_dict(known)
    assert (read.eos_token_id, read.mask_token_id, read.attention_pattern) == (model.eos_token_id, 9, objective)
    assert generation_config(load_model("llada2.2-mini"), OBJECTIVES["blocks"])["suppress_tokens"] == [156930, 156931]
    assert "suppress_tokens" not in generation_config(model, OBJECTIVES["full"])
