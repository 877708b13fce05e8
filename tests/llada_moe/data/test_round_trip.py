"""Text comes back from its tokens, for each kind of tokenizer, however long texts are cut and wherever they begin."""

import string

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llada_megatron.llada_moe.data.tokenizer import encode_long
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.requests import RequestBuilder
from tests.corpora import model_for

TEXTS = st.text(st.sampled_from("ab .\n\t0\u2581é中"), max_size=24) | st.text(max_size=12)
CORPUS = ["the quick brown fox\n jumps over  the lazy dog.", "return self.names[name]\n\n"] * 20


def sentencepiece_file(folder, **settings):
    with (folder / "t.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=320, byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, **settings,
        )  # fmt: skip
    return folder / "t.model"


def hugging_face_file(folder, vocabulary, **parts):
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    byte_fallback = parts.pop("byte_fallback", False)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=byte_fallback))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def byte_level_file(folder, add_prefix_space):
    return hugging_face_file(
        folder, sorted(pre_tokenizers.ByteLevel.alphabet()), decoder=decoders.ByteLevel(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
    )  # fmt: skip


def llama_file(folder):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return hugging_face_file(
        folder, [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *string.ascii_letters], byte_fallback=True,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(steps),
    )  # fmt: skip


def metaspace_file(folder):
    return hugging_face_file(
        folder,
        ["▁", "\n", *string.printable[:62]],
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


KINDS = {
    "bpe": lambda folder: sentencepiece_file(folder, model_type="bpe", add_dummy_prefix=False),
    "bpe with a prefix": lambda folder: sentencepiece_file(folder, model_type="bpe"),
    "unigram with a prefix": lambda folder: sentencepiece_file(folder, model_type="unigram"),
    "bytes": lambda folder: byte_level_file(folder, False),
    "bytes with a prefix": lambda folder: byte_level_file(folder, True),
    "llama": llama_file,
    "metaspace": metaspace_file,
}
EXACT = {"bpe", "bpe with a prefix", "unigram with a prefix", "bytes"}
"""Kinds that can write any text. The others lose something: a space at the start, "▁", or letters they do not know."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    return request.param, load_tokenizer(KINDS[request.param](folder))


@given(text=TEXTS, limit=st.integers(1, 9))
@example(text="abcab" * 3, limit=5)
@example(text="\u2581\u2581 a\u2581b \u2581", limit=20)
@example(text=" a\n b\n\n c", limit=4)
def test_cuts_leave_no_trace(kind, text, limit):
    name, tokenizer = kind
    once = tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(encode_long(tokenizer, text, limit)) == once
    assert once == text or name not in EXACT


def test_kinds_that_lose_something_keep_plain_text(kind):
    _, tokenizer = kind
    text = "the fox jumps over"
    assert tokenizer.decode(encode_long(tokenizer, text, 5)).removeprefix(" ") == text


def test_a_text_behind_another_of_a_prompt_begins_with_nothing(kind):
    _, tokenizer = kind
    request = RequestBuilder(model_for(tokenizer), tokenizer, 4, None, None).build(Prompt(("the fo", "x jum", "ps")))
    assert tokenizer.decode(request.tokens[:-4]) == tokenizer.decode(tokenizer.encode("the fox jumps"))
