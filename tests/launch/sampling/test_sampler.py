"""The Python interface: results in order, alone or together, texts and ids, gaps and edits, steps."""

import subprocess
import sys

import pytest
import torch

from llada_megatron import Extent, Prompt, Sampler
from llada_megatron.llada_moe.errors import ConfigError, DataError, LladaError
from llada_megatron.llada_moe.sampling.presets import PRESETS

PROMPTS = ["abc", "", "a longer prompt than these", "ü€"]


def same(results):
    return [(r.number, r.text, r.tokens, r.written, r.ended, r.forwards, r.positions) for r in results]


def test_the_package_is_imported_without_torch():
    code = "import sys, llada_megatron; sys.exit('torch' in sys.modules); llada_megatron.Sampler"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_prompts_together_are_each_alone(dense):
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12, "schedule": "threshold"}
    with Sampler.open(dense, **options) as sampler:
        together = sampler.generate(PROMPTS)
    with Sampler.open(dense, **options, batch_size=1) as sampler:
        alone = sampler.generate(PROMPTS)
    assert [result.number for result in together] == [1, 2, 3, 4]
    assert same(together) == same(alone)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.text == prompt + result.new
        assert 1 <= result.forwards <= 12
        assert result.ended or result.new_tokens == 12
        assert result.tokens_per_forward == result.new_tokens / result.forwards


def test_draws_depend_on_seed_and_number(dense):
    with Sampler.open(dense, temperature=1.0, max_new_tokens=12) as sampler:
        one, two = sampler.generate(["abc", "abc"])
        assert one.tokens != two.tokens
        assert same(sampler.generate("abc")) == same([one])
        other = sampler.generate("abc", seed=1)
        assert [one.tokens for step in sampler.steps("abc", seed=1) for one in step.finished] == [other[0].tokens]
    with Sampler.open(dense, temperature=1.0, max_new_tokens=12, seed=1) as sampler:
        assert sampler.generate("abc")[0].tokens == other[0].tokens != one.tokens


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "llada2.2" and not PRESETS[name].verifies])
def test_steps_replayed_give_the_result(dense, causal, preset):
    model = causal if PRESETS[preset].causal else dense
    prompts = ["abc", Prompt.with_gaps("x <mask:4> y <mask:2> z")]
    with Sampler.open(model, preset=preset, trained_for_editing=True, max_new_tokens=40) as sampler:
        sequences, results = {1: dict(enumerate(sampler.tokenizer.encode("abc")))}, {}
        for step in sampler.steps(prompts):
            for one in step.written:
                sequences.setdefault(one.prompt, {})[one.position] = one.token
                assert one.token is None or 0 <= one.confidence <= 1
            results |= {result.number: result for result in step.finished}
        assert sorted(results) == [1, 2]
        assert same(results.values()) == same(sampler.generate(prompts))
    for i, token in enumerate(results[1].tokens):
        assert sequences[1][i] == token
    assert [t for _, t in sorted(sequences[2].items())] == [t for run in results[2].written for t in run]


def test_a_preset_of_another_kind_of_model(dense, causal):
    with pytest.raises(ConfigError, match="names no model.delete_token_id"):
        Sampler.open(causal, preset="llada2.2", trained_for_editing=True).__enter__()
    with pytest.raises(ConfigError, match="presets for this model: llada, "):
        Sampler.open(dense, preset="llada2").__enter__()


def test_gaps_of_any_order_are_filled_and_the_rest_stays(dense):
    with Sampler.open(dense) as sampler:
        (result,) = sampler.generate(Prompt.with_gaps("ab <gap:3> cd <gap> ef", word="gap"))
    first, second = result.new.split("\n") if result.new.count("\n") == 1 else (None, None)
    assert [len(run) for run in result.written] == [3, 1]
    assert result.forwards == 4
    if first is not None:
        assert result.text == f"ab {first} cd {second} ef"
    assert 2 not in result.written[0] + result.written[1]


def test_an_edit_leaves_the_rest_alone(dense):
    text = "the quick brown fox"
    with Sampler.open(dense) as sampler:
        (same_length,) = sampler.generate(Prompt.edited(text, Extent.parse("4:9")))
        (longer,) = sampler.generate(Prompt.edited(text, Extent.parse("4:9"), tokens=8))
        (inserted,) = sampler.generate(Prompt.edited(text, Extent.parse("4:4"), tokens=2))
        ids = sampler.tokenizer.encode(text)
        (of_ids,) = sampler.generate(Prompt.edited(ids, Extent.parse("-3:")))
    for result, count in ((same_length, 5), (longer, 8)):
        assert result.text.startswith("the ")
        assert result.text.endswith(" brown fox")
        assert result.new_tokens == count
    assert inserted.text.endswith("quick brown fox")
    assert inserted.tokens[:4] == ids[:4]
    assert inserted.tokens[6:] == ids[4:]
    assert of_ids.tokens[:-3] == ids[:-3]
    assert of_ids.new_tokens == 3


def test_the_gap_word_is_ordinary_text_in_a_continuation(dense):
    with Sampler.open(dense, max_new_tokens=2) as sampler:
        assert sampler.generate("a <mask> b")[0].text.startswith("a <mask> b")


def test_only_ids_with_a_token_are_written(dense):
    with Sampler.open(dense, temperature=5.0, max_new_tokens=100) as sampler:
        size = sampler.tokenizer.vocab_size
        for result in sampler.generate(["a"] * 2):
            assert 3 not in result.tokens
            assert max(result.tokens) < size


def test_a_mask_in_the_prompt_is_text(dense):
    with Sampler.open(dense, max_new_tokens=4) as sampler:
        (result,) = sampler.generate([10, 3, 11])
    assert result.tokens[:3] == [10, 3, 11]
    assert result.forwards <= 4


def test_without_a_tokenizer(mute):
    with Sampler.open(mute, max_new_tokens=4) as sampler:
        (result,) = sampler.generate([[10, 11]])
        assert result.text is None
        assert result.new is None
        assert result.tokens[:2] == [10, 11]
        with pytest.raises(DataError, match="--tokenizer FILE, or give token ids"):
            sampler.generate("abc")


def test_blocks_of_a_block_causal_model(causal):
    with Sampler.open(causal, max_new_tokens=40, schedule="threshold") as sampler:
        (result,) = sampler.generate("abc")
        assert result.ended or len(result.tokens) == 43
        positions = [one.position for step in sampler.steps("abc") for one in step.written]
    assert max(positions) < 43


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a" * 130, r"130 tokens and 8 new ones = 138; the model takes 128, that is 10 too many: shorten the prompt"),
        ("a" * 125, r"133; the model takes 128, that is 5 too many: at most 3 new tokens fit"),
        ([1, 999], r"no token 999, its ids are 0 to 271"),
        ([1, "a"], r"a text, a list of token ids or a Prompt"),
        (Prompt.with_gaps("a<mask:99999999999>"), r"that is 99999999872 too many"),
        (b"abc", r"a text, a list of token ids or a Prompt"),
        ({"text": "a"}, r"a text, a list of token ids or a Prompt"),
        ([1, True], r"a text, a list of token ids or a Prompt"),
        (Prompt.edited("a" * 10, Extent(2, 4), 200), r"208 tokens with the gaps; .* that is 80 too many"),
    ],
)
def test_what_cannot_be_written(dense, prompt, text):
    with Sampler.open(dense, max_new_tokens=8) as sampler:
        with pytest.raises(ConfigError, match=text):
            sampler.generate([prompt])
        if isinstance(prompt, bytes | dict):
            with pytest.raises(ConfigError, match=text):
                sampler.generate(prompt)


@pytest.mark.parametrize("wrong", [5, None, "half \ud800", "byte \udcff"])
def test_what_is_no_prompt(dense, wrong):
    with Sampler.open(dense) as sampler, pytest.raises(LladaError, match="a prompt is a text|not UTF-8"):
        sampler.generate(wrong)


def test_prompts_of_any_kind_of_sequence(dense):
    with Sampler.open(dense, max_new_tokens=2) as sampler:
        expected = same(sampler.generate([[10, 11], [12, 13]]))
        tensor = torch.tensor([[10, 11], [12, 13]])
        for prompts in (tensor, list(tensor), tensor.numpy(), (row for row in [[10, 11], (12, 13)])):
            assert same(sampler.generate(prompts)) == expected
        for prompt in (tensor[0], tensor[0].numpy(), list(tensor.numpy()[0]), (i for i in (10, 11))):
            assert same(sampler.generate(prompt)) == expected[:1]
        assert len(sampler.generate(str(i) for i in range(3))) == 3
        assert sampler.generate([]) == []


def test_steps_that_nobody_takes_do_no_harm(dense):
    with Sampler.open(dense, schedule="threshold", max_new_tokens=6) as sampler:
        expected = same(sampler.generate("ab"))
        left = sampler.steps("import ")
        next(left)
        assert same(sampler.generate("ab")) == expected
        with pytest.raises(RuntimeError):
            for _ in sampler.steps("import "):
                raise RuntimeError
        assert same(sampler.generate("ab")) == expected
        assert sum(len(step.finished) for step in left) == 1


@pytest.mark.parametrize("setting", [{"temperature": float("nan")}, {"guidance": float("nan")}, {"guidance": -1e999}])
def test_numbers_that_are_none(dense, setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Sampler.open(dense, **setting).__enter__()


def test_the_block_grid_is_rounded_up_before_the_length_is_checked(causal):
    with Sampler.open(causal) as sampler:
        (fits,) = sampler.generate("a" * 90, max_new_tokens=38)
        assert len(fits.tokens) <= 128
        with pytest.raises(
            ConfigError, match=r"129, in whole blocks of 32 = 160; the model takes 128, that is 32 too many"
        ):
            sampler.generate("a" * 90, max_new_tokens=39)


def test_one_sampler_at_a_time(dense):
    with Sampler.open(dense), pytest.raises(ConfigError, match="in a process group already"), Sampler.open(dense):
        pass
