"""`generate` of an export gives the tokens of our own sampler, and is in every export."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager

import pytest
import torch

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.parallel.sampling.sampler import Sampler
from llada_megatron.tools.bench.layouts import MODELS
from llada_megatron.tools.convert.huggingface_source import HuggingFaceSource, stated_attention
from tests.llada_moe.huggingface.exported import load, modules_in, random_peer
from tests.tools.convert.checkpoints import to_huggingface, to_sharded, with_tokenizer

transformers = pytest.importorskip("transformers")

PROMPT = torch.randint(10, 120, (1, 11), generator=torch.Generator().manual_seed(3))
NEW = 22
"""Neither the prompt nor the new tokens are whole blocks."""
ATTENTION = {
    "full": ObjectiveConfig(),
    "blocks": ObjectiveConfig(block_size=8),
    "routed": ObjectiveConfig(block_size=5),
}


@pytest.fixture(scope="module", autouse=True)
def cache_of_modules(tmp_path_factory):
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(model, attention) -> a sharded checkpoint of random weights that were trained for it, and its export."""
    root, made = tmp_path_factory.mktemp("pairs"), {}

    def make(case, attention, **config):
        key = (case, attention, *config.items())
        if key not in made:
            folder = root / str(len(made))
            peer = random_peer(folder / "random", MODELS[case])
            for weight in peer.parameters():
                weight.data *= 3 if weight.dim() == 2 else 1  # or almost every token would be the same
            peer.save_pretrained(folder / "random")
            path = folder / "random/config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(HuggingFaceSource, "objective", ATTENTION[attention])
                to_sharded(folder / "random", folder / "sharded")
            to_huggingface(folder / "sharded", folder / "exported")
            made[key] = folder / "sharded", folder / "exported"
        return made[key]

    return make


@contextmanager
def both(pair, **settings):
    """Our sampler and the exported model."""
    sharded, exported = pair
    peer = load(exported)
    with Sampler.open(sharded, max_new_tokens=NEW, **settings) as sampler:
        yield sampler, peer


def sampled(sampler, prompt=PROMPT):
    (result,) = sampler.generate([prompt[0].tolist()])
    return result.tokens[prompt.shape[1] :]


STEPS = [
    ("dense", "full", 8, 24), ("dense", "full", 22, 5), ("dense", "full", 100, 22), ("dense", "blocks", 8, 7),
    ("softmax", "full", 4, 9), ("softmax", "blocks", 8, 22),
]  # fmt: skip


@pytest.mark.parametrize(("case", "attention", "block", "steps"), STEPS)
def test_fixed_steps_are_ours(pairs, case, attention, block, steps):
    length = None if attention == "blocks" else block
    with both(pairs(case, attention), block_length=length, overrides={"schedule.steps": steps}) as (sampler, peer):
        found = peer.generate(PROMPT, steps=steps, gen_length=NEW, block_length=block)
        assert found.shape == (1, 11 + NEW) and torch.equal(found[:, :11], PROMPT)
        assert found[0, 11:].tolist() == sampled(sampler)
        assert len(set(sampled(sampler))) > 1  # not equal because everything is one token
    # rows of a batch are sampled as they are alone, padding on the left included
    if attention == "full":
        shorter = torch.cat([torch.full((1, 4), 1), PROMPT[:, :7]], 1)
        seen = torch.ones(2, 11)
        seen[1, :4] = 0
        with both(pairs(case, attention), block_length=length, overrides={"schedule.steps": steps}) as (sampler, _):
            rows = peer.generate(torch.cat([PROMPT, shorter]), seen, steps, NEW, block)
            assert rows[0, 11:].tolist() == sampled(sampler)
            assert rows[1, 11:].tolist() == sampled(sampler, PROMPT[:, :7])


def test_guidance_is_ours(pairs):
    steps = {"schedule.steps": NEW}
    with both(pairs("dense", "full"), block_length=8, guidance=1.5, overrides=steps) as (sampler, peer):
        found = peer.generate(PROMPT, steps=NEW, gen_length=NEW, block_length=8, cfg_scale=1.5)
        assert found[0, 11:].tolist() == sampled(sampler)


THRESHOLDS = [
    ("sigmoid", "blocks", 8, 0.03, 3), ("sigmoid", "blocks", 8, 0.95, 8), ("sigmoid", "full", 8, 0.03, 4),
    ("blocks", "routed", 5, 0.03, 32),
]  # fmt: skip


@pytest.mark.parametrize(("case", "attention", "block", "threshold", "steps"), THRESHOLDS)
def test_thresholds_are_ours(pairs, case, attention, block, threshold, steps):
    settings = {"schedule": "floored-threshold", "block_length": block if attention == "full" else None}
    settings["overrides"] = {"schedule.threshold": threshold, "schedule.steps": steps}
    with both(pairs(case, attention), **settings) as (sampler, peer):
        found = peer.generate(inputs=PROMPT, gen_length=NEW, block_length=block, steps=steps, threshold=threshold)
        assert found[0].tolist() == sampled(sampler) and len(set(found[0].tolist())) > 1


@pytest.mark.parametrize("case", ["dense", "sigmoid"])
def test_an_end_of_text_ends_it(pairs, case):
    with both(pairs(case, "full"), block_length=8) as (sampler, _):
        end = sampled(sampler)[9]
    settings = {"overrides": {"schedule.steps": NEW}}
    if case == "sigmoid":
        settings = {"schedule": "floored-threshold", "overrides": {"schedule.steps": 8}}
    with both(pairs(case, "full", eos_token_id=end), block_length=8, **settings) as (sampler, peer):
        (result,) = sampler.generate([PROMPT[0].tolist()])
        ours = result.tokens[11:]
        assert result.ended and len(ours) < NEW
        if case == "dense":  # as published, it does not stop
            found = peer.generate(PROMPT, steps=NEW, gen_length=NEW, block_length=8)[0, 11:].tolist()
            assert found[: len(ours) + 1] == [*ours, end] and len(found) == NEW
            free = peer.generate(PROMPT, steps=NEW, gen_length=NEW, block_length=8, logits_eos_inf=True)
            assert end not in free[0, 11:]
            return
        for early in (False, True):
            options = {"gen_length": NEW, "block_length": 8, "steps": 8, "eos_early_stop": early}
            assert peer.generate(PROMPT, **options)[0].tolist() == [*ours, end]
        two = peer.generate(torch.cat([PROMPT, PROMPT.flip(1)]), **options)
        assert two[0, : len(ours)].tolist() == ours and set(two[0, len(ours) :].tolist()) == {end}


@torch.no_grad()
def test_ends_of_text_can_come_last(pairs):
    """Beside the published rule, written down plainly; without it the end of text would be the first token."""
    peer = load(pairs("dense", "full")[1])
    mask = torch.tensor([peer.config.mask_token_id])

    def surest(tokens, left, ends):
        logits = peer(tokens).logits[0].index_fill(-1, mask, -torch.inf)
        chosen, chances = (
            logits.argmax(-1),
            logits.index_fill(-1, torch.tensor(ends, dtype=torch.int64), -torch.inf).softmax(-1),
        )
        place = max(sorted(left), key=lambda at: float(chances[at, chosen[at]]))
        return place, int(chosen[place])

    tokens, left = torch.cat([PROMPT, mask.expand(1, NEW)], 1), set(range(11, 11 + NEW))
    _, end = surest(tokens, left, [])
    peer.config.eos_token_id, written = end, []
    while left:
        place, token = surest(tokens, left, [end])
        tokens[0, place] = token
        left.remove(place)
        written.append(token)
    found = peer.generate(PROMPT, steps=NEW, gen_length=NEW, confidence_eos_eot_inf=True)
    assert torch.equal(found, tokens) and written[0] != end


def test_ids_that_the_tokenizer_lacks_are_never_sampled(tmp_path):
    random_peer(tmp_path / "random", MODELS["dense"]).save_pretrained(tmp_path / "random")
    path = tmp_path / "random/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 3, "eos_token_id": 2}))
    with_tokenizer(tmp_path / "random")  # of 15 ids
    to_sharded(tmp_path / "random", tmp_path / "sharded")
    to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    prompt = torch.tensor([[5, 6, 7, 8]])
    with both((tmp_path / "sharded", tmp_path / "exported")) as (sampler, peer):
        ours = sampled(sampler, prompt)
        found = peer.generate(prompt, steps=NEW, gen_length=NEW)[0, 4:].tolist()
    assert max(found) < 15 and 3 not in found and found[: len(ours)] == ours
    assert load(tmp_path / "exported").generation_config.suppress_tokens == list(range(15, MODELS["dense"].vocab_size))


@pytest.mark.parametrize("case", ["dense", "sigmoid"])
def test_draws_at_a_temperature_follow_the_seed(pairs, case):
    peer = load(pairs(case, "full")[1])
    more = {"top_k": 20, "top_p": 0.9} if case == "sigmoid" else {}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(peer.generate(PROMPT, gen_length=NEW, block_length=8, temperature=1.0, **more).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_are_from_the_best(pairs):
    """Of one token, or of tokens of next to no probability, only the best one remains."""
    peer = load(pairs("sigmoid", "full")[1])
    options = {"gen_length": NEW, "block_length": 8, "steps": 8, "threshold": 1.0}
    one = peer.generate(PROMPT, temperature=0.7, top_k=1, **options)
    assert torch.equal(one, peer.generate(PROMPT, temperature=0.7, top_p=1e-9, **options))


REFUSED = [
    ("dense", "full", {"steps": 0}, "steps, gen_length and block_length are 1 or more"),
    ("dense", "full", {"remasking": "some"}, "remasking low_confidence or random"),
    ("dense", "blocks", {"block_length": 16}, "block_length 16: the weights were trained with blocks of 8"),
    ("dense", "blocks", {"attention_mask": torch.tensor([[0] + [1] * 10])}, "sample prompts of different lengths one"),
    ("dense", "full", {"inputs": PROMPT}, "give the token ids"),
    ("sigmoid", "full", {"gen_length": 3, "minimal_topk": 4}, "minimal_topk are 1 or more"),
    ("sigmoid", "full", {"attention_mask": torch.tensor([[0] + [1] * 10])}, "padding: sample prompts of different"),
]


@pytest.mark.parametrize(("case", "attention", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused(pairs, case, attention, options, message):
    with pytest.raises(ValueError, match=message):
        load(pairs(case, attention)[1]).generate(PROMPT, **options)


def test_a_model_that_fills_no_masks_says_so(pairs):
    peer = load(pairs("dense", "full")[1])
    with pytest.raises(TypeError, match="max_new_tokens"):
        peer.generate(PROMPT, max_new_tokens=5)
    peer.generation_config.attention_pattern = "joint"
    with pytest.raises(ValueError, match="behind a text that is read causally"):
        peer.generate(PROMPT, gen_length=4)
    peer.generation_config.attention_pattern = "causal"
    with pytest.raises(ValueError, match="trained autoregressively"):
        peer.generate(PROMPT, gen_length=4)


@pytest.mark.parametrize("case", ["dense", "softmax", "sigmoid"])
def test_the_example_of_the_card_runs(pairs, case, monkeypatch):
    _, exported = pairs(case, "full")
    example = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(exported)
    scope = {}
    exec(example, scope)
    assert 0 < scope["answer"].numel() <= 64


def test_auto_model_of_llada_moe_has_the_logits_as_published(pairs):
    _, exported = pairs("softmax", "full")
    model = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert type(model).__name__ == "LLaDAMoEModelLM" and model(PROMPT).logits.shape == (1, 11, model.config.vocab_size)


@pytest.mark.parametrize(("case", "attention"), [("dense", "blocks"), ("sigmoid", "full"), ("softmax", "full")])
def test_an_export_that_is_imported_again_attends_as_before(pairs, case, attention):
    _, exported = pairs(case, attention)
    assert HuggingFaceSource(exported).objective == ATTENTION[attention]


def test_what_an_export_says_of_its_attention(pairs, tmp_path):
    _, exported = pairs("dense", "full")
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy/generation_config.json"
    for known, objective in (
        ({"attention_pattern": "causal"}, ObjectiveConfig(kind="autoregressive")),
        ({"attention_pattern": "blocks", "block_length": 4}, ObjectiveConfig(block_size=4)),
        ({"attention_pattern": "joint", "block_length": 4}, JointConfig(kind="joint", block_size=4)),
        ({"attention_pattern": "something else"}, ObjectiveConfig()),
        ({}, ObjectiveConfig()),
    ):
        path.write_text(json.dumps(known))
        assert HuggingFaceSource(tmp_path / "copy").objective == objective
    path.write_text('{"attention_pattern": "blocks", "block_length": "4"}')
    with pytest.raises(CheckpointError, match="needs a block_length"):
        stated_attention(tmp_path / "copy")


def test_transformers_keeps_what_is_said_of_the_attention(pairs, tmp_path):
    load(pairs("dense", "blocks")[1]).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert (kept["attention_pattern"], kept["block_length"]) == ("blocks", 8)
