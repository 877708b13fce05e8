"""Prompts: gaps, extents, lines of JSON."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.launch.sampling.prompt_sources import PromptOptions, parse_lines, read_lines, read_texts
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.parallel.sampling.prompts import Extent, Gap, Prompt, split_gaps
from llada_megatron.parallel.sampling.results import token_pieces
from tests.launch.sampling.checkpoints import tokenizer_in


def test_split_gaps():
    assert split_gaps("a<mask>b <mask:3>") == ["a", Gap(1), "b ", Gap(3)]
    assert split_gaps("<gap:2><mask>", "gap") == [Gap(2), "<mask>"]
    assert split_gaps("nothing") == ["nothing"]
    with pytest.raises(ConfigError, match="at least one token"):
        split_gaps("a <mask:0>")
    assert split_gaps(f"<mask:{'9' * 5000}>")[0].tokens > 10**17
    with pytest.raises(ConfigError, match="no extent"):
        Extent.parse("9" * 5000 + ":")


@given(st.text(min_size=1), st.data())
def test_extents_are_slices(text, data):
    ends = st.none() | st.integers(-len(text), len(text))
    start, end = data.draw(ends), data.draw(ends)
    written = f"{'' if start is None else start}:{'' if end is None else end}"
    low, high = slice(start, end).indices(len(text))[:2]
    if low < high:
        assert Extent.parse(written).within(len(text)) == (low, high)
        assert Prompt.edited(text, Extent.parse(written)).pieces.count(Gap(None, text[low:high])) == 1


@pytest.mark.parametrize("text", ["5", "a:b", "1:2:3", "", "4-9"])
def test_what_is_no_extent(text):
    with pytest.raises(ConfigError, match="is no extent"):
        Extent.parse(text)


@pytest.mark.parametrize("extent", ["3:20", "5:2", "-20:1"])
def test_extents_outside_of_the_text(extent):
    with pytest.raises(ConfigError, match="does not lie in a text of length 10"):
        Prompt.edited("0123456789", Extent.parse(extent))


def test_lines():
    lines = [
        '{"text": "a", "id": "one", "max_new_tokens": 5, "other": 1}\n',
        "\n",
        '{"tokens": [1, 2, 3, 4], "gaps": [[0, 1], [2, 4]]}\n',
    ]
    source = parse_lines(lines, "f", PromptOptions())
    assert source.broken == []
    assert source.prompts == [
        Prompt(("a",), 1, "one", 5),
        Prompt((Gap(1), (2,), Gap(2)), 3),
    ]


BROKEN = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ("{}", "a prompt is"),
    ('{"text": "a", "tokens": [1]}', "a prompt is"),
    ('{"text": 5}', "a prompt is"),
    ('{"tokens": [1, "a"]}', "not all token ids"),
    ('{"tokens": [1, true]}', "not all token ids"),
    ('{"text": "a", "max_new_tokens": 0}', "max_new_tokens 0"),
    ('{"tokens": [1, 2], "gaps": [[1, 3]]}', "gap [1, 3]"),
    ('{"tokens": [1, 2], "gaps": []}', '"gaps" is a list'),
    ('{"tokens": [1, 2], "gaps": [[0, 1], [0, 1]]}', "come in order"),
    ("[" * 5000, "not JSON"),
    ('{"text": "\udcff"}', "not UTF-8"),
    ('{"text": "a\\ud800"}', '"text": not UTF-8 text (character 1'),
    ('{"text": "a", "id": ["\\ud800"]}', '"id": not UTF-8'),
    ('{"text": "abc", "gaps": [[0, 1]]}', '"gaps" belong to "tokens"'),
]


def test_broken_lines_are_told_and_the_others_taken():
    lines = [text for broken, _ in BROKEN for text in (broken + "\n", json.dumps({"text": "fine"}) + "\n")]
    source = parse_lines(lines, "in.jsonl", PromptOptions())
    assert [prompt.number for prompt in source.prompts] == list(range(2, 2 * len(BROKEN) + 1, 2))
    for i, (message, (_, reason)) in enumerate(zip(source.broken, BROKEN, strict=True)):
        assert message.startswith(f"in.jsonl, line {2 * i + 1}: ")
        assert reason in message


def test_lines_to_be_filled():
    source = parse_lines(
        ['{"text": "a <mask:2>"}', '{"text": "a"}', '{"tokens": [1]}'], "f", PromptOptions(infill=True)
    )
    assert source.prompts == [Prompt(("a ", Gap(2)), 1)]
    assert "no <mask> to fill" in source.broken[0]
    assert '"gaps"' in source.broken[1]


def test_lines_to_be_edited():
    lines = ['{"tokens": [1, 2, 3], "max_new_tokens": 2}', '{"tokens": [1, 2, 3]}', '{"tokens": [1], "gaps": [[0, 1]]}']
    source = parse_lines(lines, "f", PromptOptions(edit=Extent(0, 1), new_tokens=5))
    assert source.prompts == [Prompt((Gap(2), (2, 3)), 1), Prompt((Gap(5), (2, 3)), 2)]
    assert '"gaps" and --edit' in source.broken[0]


def test_files_are_read_to_the_letter(tmp_path):
    (tmp_path / "text").write_bytes("a\r\nü\r".encode())
    assert read_texts([], [str(tmp_path / "text")], PromptOptions()).prompts == [Prompt(("a\r\nü\r",), 1)]
    (tmp_path / "lines").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n\xff\n')
    source = read_lines(str(tmp_path / "lines"), PromptOptions())
    assert source.prompts == [Prompt(("a",), 1), Prompt(("b",), 2)]
    assert "line 3: not UTF-8" in source.broken[0]
    for wrong in ("nowhere", "."):
        with pytest.raises(DataError, match=f"{wrong}: "):
            read_texts([], [str(tmp_path / wrong)], PromptOptions())


def test_standard_input_is_read_to_the_letter(monkeypatch):
    def given_bytes(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))

    given_bytes(b"a\r\n")
    assert read_texts([], [], PromptOptions()).prompts == [Prompt(("a\r\n",), 1)]
    given_bytes(b"\xff")
    with pytest.raises(DataError, match="standard input: not UTF-8"):
        read_texts([], [], PromptOptions())
    given_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xff\n{"text": "b"}\n')
    source = read_lines("-", PromptOptions())
    assert [prompt.number for prompt in source.prompts] == [1, 3]
    assert "standard input, line 2: not UTF-8" in source.broken[0]


def test_the_digest_is_of_what_is_asked_for():
    one = Prompt(("a",), 1)
    assert one.digest == Prompt(("a",), 2, "x").digest
    others = [Prompt(("b",)), Prompt(("a",), max_new_tokens=3), Prompt(("a", Gap(1))), Prompt(((97,),))]
    assert len({one.digest, *(other.digest for other in others)}) == 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_in(folder)
    return load_tokenizer(folder)


@given(st.text())
def test_pieces_joined_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(piece or "" for piece in pieces) == text


def test_pieces_beside_masked_positions(tokenizer):
    euro = tokenizer.encode("€")
    pieces = token_pieces(tokenizer, [*tokenizer.encode("a"), euro[0], None, *euro])
    assert pieces == ["a", "\ufffd", None, "", "", "€"]
