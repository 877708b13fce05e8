"""Exported tokenizers: transformers gives our ids for any text, and nothing of an imported folder is lost or run."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.data.sentencepiece_tokenizer import train_sentencepiece
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.sentencepiece_conversion import Kind, convert, read_model
from llada_megatron.llada_moe.huggingface.tokenizer_export import find_tokenizer_files, tokenizer_files

CORPUS = ["def run(self, name):\n    return self.names[name]  # ☃\n\n\n", "the quick brown fox\tjumps\r\n"] * 20
NASTY = "a\0b \u2581c\u2581 <mask> <s></s><unk> <0x41>\r\n\u2028\x85 é 漢字😀 \ufeff  <|mask|><|endoftext|>"
LETTERS = ["".join(random.Random(seed).choices("aaab b", k=80)) for seed in range(60)]
TEXT = st.lists(
    st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["ab", "a", "b", " ", "\n", "\u2581", "the", "<mask>", "</s>"])
).map("".join)


def trained(folder, size=310, corpus=CORPUS):
    return train_sentencepiece(corpus, size, folder / "my.tokenizer.model")


def byte_level(folder, special=("<|endoftext|>", "<|mask|>"), ordinary=(), name="tokenizer.json", template=False):
    """256 bytes, one merge, then the added tokens."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={**alphabet, "ab": 256}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 257)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / name))
    return folder / name


def model_for(tokenizer, **changes):
    ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "mask_token_id": tokenizer.mask_id}
    return dataclasses.replace(load_model("tiny-dense"), **{**ids, **changes})


def loaded(folder):
    """What a user of the export gets."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ids(theirs, text):
    return theirs(text, add_special_tokens=False)["input_ids"]


def export(source, folder, model):
    result = tokenizer_files(source, model)
    folder.mkdir()
    for name, data in result.files.items():
        (folder / name).write_bytes(data)
    return result


SOURCES = {
    "sentencepiece": lambda folder: trained(folder).path,
    "sentencepiece, two letters": lambda folder: trained(folder, 330, LETTERS).path,
    "with a mask": lambda folder: byte_level(folder, name="my.tokenizer.json"),
    "without": lambda folder: byte_level(folder, ("<|endoftext|>",), name="my.tokenizer.json"),
    "mask not marked special": lambda folder: byte_level(
        folder, ("<|endoftext|>",), ("<|mask|>",), "my.tokenizer.json"
    ),
    "folder": lambda folder: byte_level(folder / "tokenizer", ("<|endoftext|>",), template=True).parent,
}


@pytest.fixture(scope="module", params=SOURCES)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    source = SOURCES[request.param](folder)
    ours = load_tokenizer(source)
    result = export(source, folder / "out", model_for(ours))
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(result.files) and not result.notes
    assert {path.name for path in (folder / "out").iterdir()} == set(result.files)
    return ours, loaded(folder / "out"), load_tokenizer(folder / "out")


@given(TEXT)
@example(NASTY)
@example("ababababaabab" * 50)
@example("")
def test_transformers_gives_our_ids(exported, text):
    ours, theirs, again = exported
    expected = ours.encode(text)
    assert ids(theirs, text) == expected == again.encode(text)
    assert theirs.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours.decode(
        expected
    )


def test_the_special_tokens_are_the_models(exported):
    ours, theirs, again = exported
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (ours.eos_id, ours.eos_id, ours.mask_id)
    assert (again.eos_id, again.mask_id, again.vocab_size) == (ours.eos_id, ours.mask_id, ours.vocab_size)
    assert len(theirs) == ours.vocab_size
    assert theirs.decode([ours.mask_id, *ours.encode("fox"), ours.eos_id], skip_special_tokens=True) == "fox"


def test_files_of_a_folder_stay_as_they_are(tmp_path):
    source = byte_level(tmp_path / "in").parent
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "extra": "é"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text("{}")
    (source / "model.safetensors").write_text("")
    (source / "tokenization_mine.py").write_text("raise SystemExit('run')")
    kept = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in find_tokenizer_files(source)) == kept
    model = model_for(load_tokenizer(source), vocab_size=300)
    for number, given_as in enumerate((source, source / "tokenizer.json")):
        result = export(given_as, tmp_path / str(number), model)
        assert sorted(result.files) == kept
        assert all((source / name).read_bytes() == (tmp_path / str(number) / name).read_bytes() for name in kept)
        assert result.notes == [f"tokenization_mine.py of {source}: code, neither run nor copied"]


def test_only_what_is_missing_is_added(tmp_path):
    source = byte_level(tmp_path / "in", ("<|endoftext|>", "<stop>")).parent
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<stop>"},
        "auto_map": {"AutoTokenizer": ["tokenization_mine.T", None]},
        "extra": 1,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    model = model_for(load_tokenizer(source), vocab_size=300)
    result = export(source, tmp_path / "out", model)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {
        "eos_token": {"__type": "AddedToken", "content": "<stop>"}, "pad_token": "<stop>", "mask_token": "<mask>",
        "extra": 1, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    assert len(result.notes) == 1 and "names code" in result.notes[0]
    theirs = loaded(tmp_path / "out")
    assert theirs.mask_token_id == model.mask_token_id == 259


def test_a_mask_beyond_the_next_id_has_no_name(tmp_path):
    source = byte_level(tmp_path, ("<|endoftext|>",), name="mine.json")
    result = export(source, tmp_path / "out", model_for(load_tokenizer(source), vocab_size=300, mask_token_id=299))
    assert len(result.notes) == 1 and "ends at id 257: the mask's, 299, has no name" in result.notes[0]
    assert loaded(tmp_path / "out").mask_token is None


def test_without_a_tokenizer_nothing_is_written(tmp_path):
    assert export(None, tmp_path / "out", load_model("tiny-dense")).files == {}
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_tokenizer_files(tmp_path) == []


def test_folder_without_a_fast_tokenizer_is_copied(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (source / name).write_text("{}")
    result = export(source, tmp_path / "out", load_model("tiny-dense"))
    assert sorted(result.files) == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    assert "has no tokenizer.json" in result.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.json", b"{}", "not a Hugging Face tokenizer"),
        ("mine.json", b"[1]", "not a JSON object"),
        ("mine.json", b"{", "not JSON"),
        ("mine.model", b"\xff\xff", "not a SentencePiece model"),
        ("folder/README.md", b"", "no file of a tokenizer in this folder"),
        ("absent.json", None, "no such tokenizer file"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, message):
    source = tmp_path / name
    if content is not None:
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(content)
    source = source.parent if "/" in name else source
    with pytest.raises(DataError, match=f"^{source}: {message}"):
        export(source, tmp_path / "out", load_model("tiny-dense"))


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    source = byte_level(tmp_path)
    for changes in ({"vocab_size": 200}, {"vocab_size": 400, "eos_token_id": 300}):
        with pytest.raises(DataError, match="is not the tokenizer of this model: it has 259 ids"):
            tokenizer_files(source, model_for(load_tokenizer(source), **changes))


def sentencepiece_file(folder, **options):
    path = folder / "theirs.model"
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, hard_vocab_limit=False,
            **{"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
               "normalization_rule_name": "identity", "user_defined_symbols": ["<gap>"], **options},
        )  # fmt: skip
    return path


def test_pieces_are_those_of_sentencepiece(tmp_path):
    path = sentencepiece_file(tmp_path, control_symbols=["<|role|>"])
    processor = sentencepiece.SentencePieceProcessor(str(path))
    pieces = read_model(path.read_bytes()).pieces
    assert [piece.text for piece in pieces] == [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert [piece.score for piece in pieces] == [processor.get_score(i) for i in range(processor.get_piece_size())]
    for kind, says in (
        (Kind.CONTROL, processor.is_control),
        (Kind.BYTE, processor.is_byte),
        (Kind.UNKNOWN, processor.is_unknown),
    ):
        assert [i for i, piece in enumerate(pieces) if piece.kind is kind] == [i for i in range(len(pieces)) if says(i)]
    assert [piece.text for piece in pieces if piece.kind is Kind.USER_DEFINED] == ["<gap>"]


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_models_of_others(tmp_path, dummy_prefix):
    symbols = [] if dummy_prefix else ["<gap>"]
    path = sentencepiece_file(tmp_path, add_dummy_prefix=dummy_prefix, user_defined_symbols=symbols)
    ours = load_tokenizer(path)
    assert ours.mask_was_added and not export(path, tmp_path / "out", model_for(ours)).notes
    theirs = loaded(tmp_path / "out")
    for text in ("the quick <gap>fox <gap><gap>", " fox", "", "漢  <mask>"):
        assert ids(theirs, text) == ours.encode(text)
    assert theirs.mask_token_id == ours.mask_id


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "no byte-pair model"),
        ({"byte_fallback": False}, "no pieces for bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"add_dummy_prefix": True}, "puts spaces before its own symbols"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ],
)
def test_models_without_an_equal_are_copied(tmp_path, options, reason):
    path = sentencepiece_file(tmp_path, **options)
    result = export(path, tmp_path / "out", model_for(load_tokenizer(path)))
    assert list(result.files) == ["tokenizer.model"] and reason in result.notes[0]
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()


def test_the_same_model_gives_the_same_file(tmp_path):
    data = trained(tmp_path).path.read_bytes()
    assert convert(read_model(data)).to_str() == convert(read_model(data)).to_str()
