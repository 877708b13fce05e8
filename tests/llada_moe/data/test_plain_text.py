"""Text read whole and in parts: the same text, the same first bad byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.data import plain_text, tokenizer
from llada_megatron.llada_moe.data.corpus import Chunk
from llada_megatron.llada_moe.data.encoding import encode_chunk
from llada_megatron.llada_moe.data.formats import Reading
from llada_megatron.llada_moe.data.plain_text import NotText, check_text, read_text, text_parts
from llada_megatron.llada_moe.data.sources import CorpusFile


class Recorder:
    """A tokenizer that keeps what it is given."""

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return []


@settings(max_examples=60, derandomize=True, deadline=None)
@given(text=st.text("ab\né😀", max_size=80), buffer=st.integers(3, 9), limit=st.integers(1, 12))
def test_parts_are_those_of_encode_long(tmp_path_factory, text, buffer, limit):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "BUFFER", buffer)
        patch.setattr(tokenizer, "encode_behind", lambda encode, part: encode(part))
        tokenizer.encode_long(recorder, text, limit)
        assert list(text_parts(path, limit)) == (recorder.texts or [""])
        assert read_text(path) == text


def test_parts_are_encoded_as_one_document(tmp_path):
    class WithPrefix:
        """Puts a space before each text, as many tokenizers do."""

        path, mask_id, eos_id = "t", 1, 0

        def encode(self, text):
            return [32, *map(ord, text)] if text else []

    source = CorpusFile(tmp_path / "a.txt", 0, True)
    parts = [("one ", True, False), ("two", False, False), (" end", False, True)]
    ids = []
    for text, begins, ends in parts:
        chunk = Chunk((source,), 0, (text,), begins=begins, ends=ends)
        ids += encode_chunk(chunk, WithPrefix(), Reading()).tokens.tolist()
    assert ids == [32, *map(ord, "one two end"), 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abcdefgh\xff", "not UTF-8 text: byte 0xff at offset 8"),
        (b"abcde\xc3", "not UTF-8 text: byte 0xc3 at offset 5"),
        (b"abcdefg\0\xff", "not text: byte 0x00 at offset 7"),
        (b"\xef\xbb\xbfabc\xff\0", "not UTF-8 text: byte 0xff at offset 6"),
    ],
)
@pytest.mark.parametrize("buffer", [4, 1 << 20])
def test_first_bad_byte(tmp_path, monkeypatch, data, message, buffer):
    monkeypatch.setattr(plain_text, "BUFFER", buffer)
    (tmp_path / "a").write_bytes(data)
    for read in (read_text, check_text, lambda path: list(text_parts(path))):
        with pytest.raises(NotText, match=f"^{message}$"):
            read(tmp_path / "a")
