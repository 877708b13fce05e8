"""Tokenizers: exact round trips, and no text that becomes a mask."""

import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llada_megatron import cli
from llada_megatron.llada_moe.data.sentencepiece_tokenizer import train_sentencepiece
from llada_megatron.llada_moe.data.tokenizer import MASK_NAMES, encode_long
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.guard import process
from llada_megatron.llada_moe.guard.limits import Limits

CORPUS = ["def run(self, name):\n    return self.names[name]  # ☃\n\n\n", "the quick brown fox\tjumps\r\n"] * 20
NASTY = "a\0b \u2581c\u2581 <mask> <s></s><unk> <0x41>\r\n\u2028\x85 é 漢字😀 \ufeff  "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sentencepiece(CORPUS, 310, tmp_path_factory.mktemp("spm") / "t.model")


def hugging_face(folder, special=("<|endoftext|>", "<|mask|>"), ordinary=(), name="tokenizer.json"):
    """A byte-level tokenizer: 256 bytes, then its added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / name))
    return folder / name


def test_trained_ids(trained):
    assert (trained.eos_id, trained.mask_id, trained.vocab_size, trained.mask_was_added) == (2, 3, 310, False)
    assert trained.decode([1, 3, *trained.encode("fox"), 3, 2]) == "fox"


@given(st.text(st.characters(codec="utf-8")))
@example(NASTY)
@example("\u2581")
@example("  \n\n\t x  ")
def test_sentencepiece_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)


@given(st.text(st.characters(codec="utf-8")))
@example(NASTY + "<|mask|><|endoftext|>")
def test_hugging_face_round_trip(tmp_path_factory, text):
    tokenizer = load_tokenizer(hugging_face(tmp_path_factory.mktemp("hf")))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("mask", MASK_NAMES)
def test_mask_in_the_text_is_text(tmp_path, trained, mask):
    for tokenizer in (trained, load_tokenizer(hugging_face(tmp_path, ("<|endoftext|>", mask)))):
        assert not tokenizer.mask_was_added
        ids = tokenizer.encode(f"x{mask}{mask} y")
        assert tokenizer.mask_id not in ids and tokenizer.decode(ids) == f"x{mask}{mask} y"


def test_mask_that_is_not_marked_special(tmp_path):
    """`<|mask|>` as an ordinary added token would be matched in text; it is marked special when loaded."""
    tokenizer = load_tokenizer(hugging_face(tmp_path, ("<|endoftext|>",), ordinary=("<|mask|>",)))
    assert tokenizer.mask_id == 256 and not tokenizer.mask_was_added
    assert 256 not in tokenizer.encode("<|mask|>")


def test_tokenizer_without_a_mask_gets_the_next_id(tmp_path):
    tokenizer = load_tokenizer(hugging_face(tmp_path, ("<|endoftext|>",)))
    assert (tokenizer.mask_was_added, tokenizer.mask_id, tokenizer.vocab_size) == (True, 257, 258)
    assert tokenizer.decode([257, *tokenizer.encode("a"), 257]) == "a"
    path = tmp_path / "bare.model"
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=60, model_type="bpe", minloglevel=2,
            user_defined_symbols=["<mask>"], hard_vocab_limit=False,
        )  # fmt: skip
    bare = load_tokenizer(path)
    assert bare.mask_was_added and bare.mask_id == bare.vocab_size - 1  # a user-defined <mask> is text, not a mask
    assert bare.mask_id not in bare.encode("a <mask> b") and bare.decode([bare.mask_id]) == ""


def test_mask_that_text_can_produce_is_no_mask(tmp_path):
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "[SEP]": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.mask_was_added, loaded.mask_id, loaded.eos_id) == (True, 4, 2)


def test_names_beside_or_given(tmp_path):
    path = hugging_face(tmp_path, ("<stop>", "<gap>", "</s>"))
    assert load_tokenizer(path).eos_id == 258
    assert load_tokenizer(path, eos_token="<stop>", mask_token="<gap>").mask_id == 257
    config = {"eos_token": {"content": "<stop>"}, "mask_token": "<gap>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.mask_id) == (256, 257) and 257 not in loaded.encode("<gap>")
    with pytest.raises(DataError, match="no mask token '<nothing>'"):
        load_tokenizer(path, mask_token="<nothing>")


def test_same_texts_same_file(tmp_path):
    one, two = (train_sentencepiece(CORPUS, 300, tmp_path / f"{i}.model") for i in range(2))
    assert one.sha256 == two.sha256 and one.path != two.path


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (CORPUS, 100_000, r"too small for a vocabulary of 100000: the largest it supports is (\d+)"),
        (CORPUS, 200, "too small"),
        (["".join(map(chr, range(0x4E00, 0x4E00 + 900)))], 300, "at least"),
        ([], 300, "no text"),
        (["", "\0"], 300, "no text"),
    ],
)
def test_vocabulary_that_cannot_be_trained(tmp_path, texts, size, message):
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, size, tmp_path / "t.model")


def test_the_suggested_size_works(tmp_path):
    with pytest.raises(DataError) as caught:
        train_sentencepiece(CORPUS, 100_000, tmp_path / "t.model")
    size = int(str(caught.value).rstrip(")").split()[-1])
    assert train_sentencepiece(CORPUS, size, tmp_path / "t.model").vocab_size == size


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json"])
def test_files_that_are_no_tokenizer(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(path)
    for content in (b"", b"nonsense", b"{}"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a"):
            load_tokenizer(path)


def test_other_paths(tmp_path):
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"SentencePiece \.model or"):
        load_tokenizer(tmp_path / "x.txt")
    with pytest.raises(DataError, match="--eos-token"):
        load_tokenizer(hugging_face(tmp_path, ("<stop>",)))


@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(1, 20))
def test_long_texts_in_parts(trained, text, limit):
    assert trained.decode(encode_long(trained, text, limit)) == text


def changed(folder, **parts):
    """`hugging_face` with parts of its file replaced."""
    path = hugging_face(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return path


SPLIT = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
DEEP = json.loads('{"type": "Sequence", "normalizers": [' * 400 + '{"type": "NFC"}' + "]}" * 400)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"pre_tokenizer": SPLIT}, "the tokenizer fails on a text .PanicException: "),
        ({"normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 12}}, "takes more than 0.25 GiB of memory"),
        ({"normalizer": DEEP}, "not a Hugging Face tokenizer .recursion limit"),
    ],
)
def test_a_tokenizer_that_explodes_is_one_line(tmp_path, monkeypatch, parts, said):
    monkeypatch.setattr(process, "LIMITS", Limits(memory_bytes=2**28))
    path = changed(tmp_path, **parts)
    with pytest.raises(DataError, match=f"^{path}:? .*{said}") as error:
        load_tokenizer(path).encode("a" * 60 + "b")
    assert "\n" not in str(error.value)


def test_a_huge_id_is_refused(tmp_path):
    path = changed(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["Ġ"] = 4294967294
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the token 'Ġ' has the id 4,294,967,294, but ids end at 4,194,303"):
        load_tokenizer(path)


def test_a_tokenizer_that_changes_while_it_is_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(hugging_face(tmp_path).name)
    monkeypatch.chdir("/")
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    hugging_face(tmp_path, ("<|endoftext|>",))
    monkeypatch.setattr(process, "LIMITS", Limits(cpu_s=9))  # another process, which has to read the file again
    with pytest.raises(DataError, match="^tokenizer.json: the tokenizer was changed"):
        tokenizer.encode("ab")


def test_a_worker_has_limits_as_well(tmp_path, capfd):
    path = changed(tmp_path, pre_tokenizer=SPLIT)
    (tmp_path / "t.txt").write_text("a" * 60 + "b")
    arguments = ["prepare", str(tmp_path / "t.txt"), "--output", str(tmp_path / "set"), "--tokenizer", str(path)]
    assert cli.main([*arguments, "--workers", "1"]) == 1
    assert cli.main([*arguments, "--workers", "2"]) == 1
    error = capfd.readouterr().err
    assert error.count("the tokenizer fails on a text (PanicException") == 2
    assert "panicked" not in error and "Traceback" not in error
