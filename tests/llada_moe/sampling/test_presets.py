from __future__ import annotations

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.llada_moe.sampling import presets
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, DualCache, NoCache, Recompute, VicinityCache
from llada_megatron.llada_moe.sampling.editors import Levenshtein, NoEditor
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.presets import CACHES, EDITORS, PRESETS, SCHEDULES, Choice, choose
from llada_megatron.llada_moe.sampling.published import name_of, settings_of
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, RandomSteps, SelfSpeculation, Threshold
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from tests.llada_moe.sampling.toy import EOS, MASK, VOCAB, bidirectional, write

FULL, CAUSAL = ObjectiveConfig(), ObjectiveConfig(block_size=4, replace_ratio=0.1)
MODEL = ModelConfig(
    family="llada",
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=VOCAB,
    max_sequence_length=64,
    mask_token_id=MASK,
    eos_token_id=EOS,
)
EDITABLE = replace(MODEL, delete_token_id=0, insert_token_id=1)


def pick(preset=None, schedule=None, cache=None, editor=None, overrides=None, objective=FULL, model=MODEL, **more):
    return choose(preset, schedule, cache, editor, overrides or {}, objective, model, **more)


def test_without_a_name_one_token_per_step_with_the_models_exact_keys():
    assert pick() == Choice(FixedSteps(), NoCache(), NoEditor(), None, None)
    assert pick(objective=CAUSAL) == Choice(FixedSteps(), BlockCausalCache(), NoEditor(), 4, 4)
    assert pick(cache="none", objective=CAUSAL).cache == Recompute()


@pytest.mark.parametrize("objective", [FULL, CAUSAL], ids=["bidirectional", "block-causal"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_models_it_says_and_no_others(name, objective):
    preset, causal = PRESETS[name], objective.block_size is not None
    if preset.verifies:
        with pytest.raises(ConfigError, match=f"--preset {name}: this model was not trained to verify what it drafts"):
            pick(name, objective=objective)
        return
    if preset.causal not in (None, causal):
        with pytest.raises(ConfigError, match=f"--preset {name}: .*presets for this model: .*fast-dllm"):
            pick(name, objective=objective)
        return
    choice = pick(name, objective=objective, model=EDITABLE)
    assert choice.cache.causal == causal
    assert choice.schedule == preset.schedule
    assert choice.block_length == (4 if causal else preset.block_length)
    assert preset.cache is None or preset.cache.causal == preset.causal


JOINT = JointConfig(kind="joint", block_size=4)


def test_a_model_that_verifies_drafts_blocks_behind_a_causal_text():
    drafting, decoding = pick("self-speculation", objective=JOINT), pick("autoregressive", objective=JOINT)
    assert drafting == Choice(SelfSpeculation(4), BlockCausalCache(), NoEditor(), None, None, True)
    assert decoding.schedule == SelfSpeculation(0)
    shorter = pick(schedule="self-speculation", overrides={"schedule.draft_length": "3"}, objective=JOINT)
    assert shorter.schedule == SelfSpeculation(3)
    assert pick("llada2", objective=JOINT).method().causal_text and not pick("llada2", objective=CAUSAL).causal_text


@pytest.mark.parametrize(
    ("choice", "objective", "message"),
    [
        (
            {"schedule": "self-speculation"},
            FULL,
            "--schedule self-speculation: this model was not .*kind diffusion.*joint",
        ),
        (
            {"preset": "self-speculation", "overrides": {"schedule.draft_length": "5"}},
            JOINT,
            "blocks of 4; use at most 4",
        ),
        (
            {"preset": "self-speculation", "editor": "wino"},
            JOINT,
            "editor wino: self-speculation writes verified tokens",
        ),
        ({"preset": "self-speculation", "cache": "dual"}, JOINT, "--cache dual: the cache is an approximation"),
        (
            {"preset": "self-speculation", "overrides": {"schedule.draft_passes": "0"}},
            JOINT,
            "draft_passes: at least 1",
        ),
        ({"preset": "fast-dllm-dual"}, JOINT, "presets for this model: .*llada2, .*self-speculation, autoregressive"),
    ],
    ids=str,
)
def test_what_does_not_go_with_self_speculation_is_refused(choice, objective, message):
    with pytest.raises(ConfigError, match=message):
        pick(**choice, objective=objective)


def test_guidance_is_not_what_a_model_decodes_with():
    with pytest.raises(ConfigError, match="guidance 0.5: self-speculation writes what the model decodes"):
        pick("self-speculation", objective=JOINT).method(guidance=0.5)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.causal is not True])
def test_every_preset_of_a_bidirectional_model_writes_a_text(name):
    """With the rules, not the caches: the toy keeps nothing."""
    choice = replace(pick(name), cache=NoCache())
    if choice.editor.shadow:
        return
    method = choice.method(excluded=[MASK, EOS], seed=3)
    requests = [continuation([5, 6], 20, choice.block_length, stream) for stream in range(2)]
    finished, _, _ = write(requests, method, bidirectional(1, 0.7), slots=1)
    for one in finished:
        assert MASK not in one.tokens
        assert one.passes <= 20


def test_parts_and_settings_take_the_place_of_the_presets():
    choice = pick(
        "fast-dllm-dual",
        cache="vicinity",
        overrides={"schedule.threshold": "0.5", "cache.before": "3", "cache.refresh_every": "7"},
        block_length=9,
    )
    assert choice.schedule == Threshold(0.5)
    assert choice.cache == VicinityCache(before=3, refresh_every=7)
    assert choice.block_length == 9
    assert PRESETS["fast-dllm-dual"].cache == DualCache()
    assert pick("fast-dllm-dual", cache="block-causal", objective=CAUSAL).cache == BlockCausalCache()
    assert pick("llada", overrides={"schedule.steps": "null"}).schedule == FixedSteps()
    assert pick("llada", schedule="random").schedule == RandomSteps()


def test_a_method_has_all_that_its_parts_ask_for():
    choice = pick("llada2.2", objective=CAUSAL, model=EDITABLE)
    assert choice.editor == Levenshtein(0.0, 16, delete_id=0, insert_id=1)
    method = choice.method(excluded=[MASK], temperature=0.5, guidance=1.0, seed=4, stop_id=EOS)
    assert isinstance(method, Method)
    assert (method.grid, method.stop_id) == (4, EOS)
    assert method.logits_processor.needs == frozenset({"text"})
    assert method.logits_processor.operations == (0, 1)
    assert method.logits_processor.excluded == (MASK,)
    assert (method.logits_processor.temperature, method.logits_processor.guidance, method.logits_processor.seed) == (
        0.5,
        1.0,
        4,
    )
    assert pick(schedule="random").method(seed=4).schedule == RandomSteps(seed=4)
    assert pick("klass", editor="wino").method().logits_processor.needs == {"divergence", "current"}
    assert len(pick("dinfer-credit").method().logits_processor.needs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "fast-dlm"}, r"no preset 'fast-dlm'; did you mean 'fast-dllm'\?; there are llada, .*llada2.2"),
        ({"schedule": "top"}, "no schedule 'top'.*there are steps, .*slowfast"),
        ({"cache": "kv"}, "no cache 'kv'.*there are none, "),
        ({"editor": "ed"}, "no editor 'ed'.*there are none, "),
        ({"overrides": {"threshold": "1"}}, "threshold=1: settings begin with schedule., cache., editor."),
        (
            {"schedule": "threshold", "overrides": {"schedule.treshold": "1"}},
            "override schedule.treshold=1: the schedule 'threshold' has no setting 'treshold'; did you mean",
        ),
        ({"overrides": {"cache.before": "1"}}, "the cache 'none' has no setting 'before'; it has none"),
        ({"overrides": {"schedule.seed": "1"}}, "no setting 'seed'"),
        ({"overrides": {"schedule.steps": "many"}}, "override schedule.steps=many: .*expected a whole number"),
        ({"overrides": {"schedule.steps": "0"}}, "schedule.steps: at least 1, found 0"),
        ({"overrides": {"schedule.remasking": "low"}}, "expected one of low_confidence, random"),
        ({"schedule": "factor", "overrides": {"schedule.factor": "x"}}, "expected a finite number"),
        ({"cache": "dual", "overrides": {"cache.refresh_every": "0"}}, "cache.refresh_every: at least 1"),
        ({"block_length": 0}, "block length 0"),
        ({"cache": "block-causal"}, "--cache block-causal: .*attention is full.*use one of none, prefix, dual"),
        ({"cache": "recompute"}, "--cache recompute: .*use one of none, prefix, dual"),
        ({"cache": "dual", "objective": CAUSAL}, "--cache dual: .*approximation.*use one of none, .*block-causal"),
        ({"preset": "llada2", "cache": "dual"}, "--preset llada2: is for block-causal models"),
        ({"preset": "fast-dllm-dual", "objective": CAUSAL}, "keeps keys approximately.*its exact cache serves"),
        ({"block_length": 8, "objective": CAUSAL}, "block length 8: .*blocks of 4 positions"),
        ({"editor": "token-editing"}, r"editor token-editing: .*not trained for editing.*replace_ratio > 0.*wino"),
        ({"editor": "levenshtein", "trained_for_editing": True}, "editor levenshtein: .*delete_token_id"),
        ({"preset": "llada2.2", "objective": CAUSAL}, "editor levenshtein: .*insert_token_id"),
    ],
)
def test_a_wrong_choice_says_what_is_wrong_and_what_is_right(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pick(**arguments)


def test_editing_is_for_models_that_learnt_it_or_are_said_to_have():
    assert pick(editor="token-editing", trained_for_editing=True).editor == EDITORS["token-editing"]()
    assert pick("llada2.1-speed", objective=CAUSAL).editor.edit_threshold == 0.0
    assert pick("wino").editor == EDITORS["wino"](0.9)
    with pytest.raises(ConfigError, match="not trained for editing"):
        pick("llada2.1-speed", objective=ObjectiveConfig(block_size=4))


def test_every_part_has_a_name_and_settings_that_are_text():
    for kind, names in (("schedule", SCHEDULES), ("cache", CACHES), ("editor", EDITORS)):
        for name, part in names.items():
            assert name_of(part()) == name
            texts = {key: "null" if v is None else str(v).lower() for key, v in settings_of(part()).items()}
            overrides = {f"{kind}.{key}": text for key, text in texts.items()}
            causal = kind == "cache" and part.causal
            objective = replace(CAUSAL if causal else FULL, replace_ratio=0.1)
            fitted = part()
            if isinstance(fitted, SelfSpeculation):
                objective, fitted = JOINT, replace(fitted, draft_length=4)
            chosen = pick(**{kind: name}, overrides=overrides, objective=objective, model=EDITABLE)
            assert settings_of(getattr(chosen, kind)) == settings_of(fitted)


def test_the_table_says_of_every_preset_what_it_does_its_settings_and_its_source():
    rows = {row["name"]: row for row in presets.describe()}
    assert set(rows) == set(PRESETS)
    assert len({preset.does + preset.source + rows[name]["settings"] for name, preset in PRESETS.items()}) == len(rows)
    assert rows["fast-dllm-dual"]["settings"].startswith("schedule threshold threshold=0.9; cache dual")
    assert rows["fast-dllm-dual"]["models"] == "bidirectional"
    for row in rows.values():
        assert all(row.values())
        assert all(text in presets.table() for text in row.values())
    assert str(pick("fast-dllm-dual")).startswith("schedule threshold threshold=0.9; cache dual")
