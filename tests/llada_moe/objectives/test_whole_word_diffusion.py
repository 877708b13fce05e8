"""Masks over whole words: which tokens are a word, and that all of them are masked or none."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.data.tokenizer_files import load_directly
from llada_megatron.llada_moe.data.word_starts import WordStarts
from llada_megatron.llada_moe.diffusion.noise import ForwardProcess, SampleCoordinates
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.evaluation.reversal_facts import make_facts
from llada_megatron.llada_moe.objectives import make_objective


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A WordPiece vocabulary, whose names have two pieces."""
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.json"
    path.write_text(make_facts(0).tokenizer())
    return load_directly(path)


def of_bytes(folder, alphabet):
    """A token for each of these byte-level characters."""
    vocabulary = {name: number for number, name in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_directly(folder / "tokenizer.json")


def words(tokenizer, text, boundaries=None):
    tokens = np.array(tokenizer.encode(text), np.int64)
    cuts = np.array([0, len(tokens)] if boundaries is None else boundaries, np.int32)
    return WordStarts(tokenizer).words(tokens, cuts).tolist()


def test_words_of_pieces_and_of_bytes(pieces, tmp_path):
    name = make_facts(0).facts[0].name
    assert words(pieces, f"surely {name} is amber") == [0, 1, 1, 3, 4]
    letters = of_bytes(tmp_path, sorted(pre_tokenizers.ByteLevel.alphabet()))
    assert words(letters, "ab c2, d") == [0, 0, 2, 2, 2, 5, 6, 6], "a space belongs to the word behind it"
    assert words(letters, "abcd", boundaries=[0, 2, 4]) == [0, 0, 2, 2], "no word reaches over a document's end"
    assert words(letters, "äb") == [0, 0, 0], "a part of a character begins no word"


def test_a_vocabulary_without_letters_has_no_words(tmp_path):
    with pytest.raises(DataError, match="no token reads as letters"):
        WordStarts(of_bytes(tmp_path, list("123")))


def test_a_word_is_masked_as_a_whole_and_as_often_as_a_token():
    noise, starts = ForwardProcess(ObjectiveConfig(random_length_probability=0.0), 1, 8), np.arange(40) // 2 * 2
    found = [noise.corrupt(SampleCoordinates(n, 0, 0, n), 40, words=starts) for n in range(500)]
    assert all((each.mask[0::2] == each.mask[1::2]).all() for each in found)
    alone = [noise.corrupt(SampleCoordinates(n, 0, 0, n), 40) for n in range(500)]
    assert all((a.mask[0::2] == b.mask[0::2]).all() and a.ratio == b.ratio for a, b in zip(found, alone, strict=True))
    short = ForwardProcess(ObjectiveConfig(random_length_probability=1.0), 1, 8)
    assert not any(
        each.mask[each.length :].any()
        for each in (short.corrupt(SampleCoordinates(n, 0, 0, n), 40, words=starts) for n in range(50))
    )


def test_replaced_tokens_are_refused():
    refused = []
    objective = make_objective(ObjectiveConfig(kind="whole_word_diffusion", replace_ratio=0.1))
    objective.check(lambda key, why: refused.append((key, why)))
    assert refused == [("objective.replace_ratio", "0.1 with kind whole_word_diffusion; use kind diffusion")]
    assert "whole words masked" in objective.description()
