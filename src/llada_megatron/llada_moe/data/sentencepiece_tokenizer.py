"""SentencePiece models: loading, exact round trips, and training one on a corpus."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llada_megatron.llada_moe.data.tokenizer import (
    EOS_NAMES,
    MASK_NAMES,
    Tokenizer,
    choose_name,
    encode_behind,
    eos_missing,
)
from llada_megatron.llada_moe.errors import DataError

SPACE_SYMBOL = "\u2581"
"""SentencePiece writes a space as this character, and therefore decodes the character itself to a space."""
SENTENCE = 4000
"""Characters of one training sentence; longer texts are cut here (pieces never grow near this length)."""
SMALLEST_VOCABULARY = 4 + 1 + 256 + 1
"""unk, bos, eos, mask, the line's end, one piece per byte, and something to learn."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. With byte fallback and an identity normaliser, decode(encode(x)) == x for any text."""

    def __init__(self, path: Path, model: bytes, sha256: str, eos_token: str | None, mask_token: str | None) -> None:
        """Load from the bytes of the file; raises DataError when they are no model or lack an end-of-text token."""
        self.path, self.sha256 = path, sha256
        try:
            if not model:
                raise RuntimeError("empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self._processor.get_piece_size()
            control = {self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i)}
        except (RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error})") from error
        self._control = frozenset(control.values())
        self.eos_id = self._find_eos(control, eos_token)
        self._space_bytes = [self._byte_id(byte) for byte in SPACE_SYMBOL.encode()]
        # Only a control symbol can never come out of text; a user-defined symbol would, so it is no mask.
        mask = choose_name(mask_token, MASK_NAMES, set(control), "mask (control symbol)", path)
        self.mask_was_added = mask is None
        self.mask_id = size if mask is None else control[mask]
        self.vocab_size = size + self.mask_was_added
        unused = [i for i in range(size) if self._processor.is_unused(i)]
        self.unused_ids = [*unused, *([self.mask_id] if self.mask_was_added else [])]
        self.special_ids = control

    def _find_eos(self, control: dict[str, int], wanted: str | None) -> int:
        """The end-of-text id: the named token, else the model's own, else a known name."""
        if wanted is None and self._processor.eos_id() >= 0:
            return self._processor.eos_id()
        name = choose_name(wanted, EOS_NAMES, set(control), "end-of-text", self.path)
        if name is None:
            raise eos_missing(self.path)
        return control[name]

    def _byte_id(self, byte: int) -> int:
        """The id of one byte's piece; the unknown id in a model without byte fallback."""
        return self._processor.piece_to_id(f"<0x{byte:02X}>")

    def encode(self, text: str) -> list[int]:
        """Ids of a text. The space symbol itself is written as bytes, or it would come back as a space."""
        if SPACE_SYMBOL not in text or self._processor.unk_id() in self._space_bytes:
            return self._processor.encode(text)
        first, *rest = text.split(SPACE_SYMBOL)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_bytes + (encode_behind(self._processor.encode, part) if part else [])
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control symbols and an added mask are left out."""
        size = self._processor.get_piece_size()
        return self._processor.decode([int(i) for i in ids if i < size and i not in self._control])


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Tokenizer:
    """Train a byte-pair vocabulary of exactly `vocab_size` ids on texts, write the model to `out`, and load it.

    Ids: unk 0, bos 1, eos 2, mask 3 (a control symbol: no text produces it), newline 4 (no piece crosses a line's end:
    a small model learns sooner what lines look like), 256 bytes, pieces. Nothing is normalised; spaces and tabs are
    kept. The same texts give the same file. Raises DataError for an impossible size.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone need {SMALLEST_VOCABULARY}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=["<mask>"], user_defined_symbols=["\n"],
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.9995,
            max_sentence_length=8 * SENTENCE,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    file, data = Path(out), model.getvalue()
    file.write_bytes(data)
    return SentencePieceTokenizer(file, data, hashlib.sha256(data).hexdigest(), None, None)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences of bounded length; NUL ends a C string and is left to its byte piece."""
    for text in texts:
        for start in range(0, len(text), SENTENCE):
            sentence = text[start : start + SENTENCE].replace("\0", "")
            if sentence:
                yield sentence


def _training_error(message: str, vocab_size: int) -> DataError:
    """SentencePiece's reasons in words: the limits it names are kept."""
    if "too high" in message and (limit := re.search(r"<=\s*(\d+)", message)):
        return DataError(
            f"the corpus is too small for a vocabulary of {vocab_size}: "
            f"the largest it supports is {limit[1]} (--vocab-size {limit[1]})"
        )
    if "smaller than required_chars" in message and (need := re.search(r"(\d+) vs (\d+)", message)):
        smallest = max(int(need[1]), int(need[2])) + 1
        return DataError(
            f"a vocabulary of {vocab_size} is too small for the characters of the corpus: at least {smallest}"
        )
    if "!sentences_.empty()" in message or "sentences_" in message:
        return DataError("the corpus holds no text to train a tokenizer on")
    return DataError(f"SentencePiece could not train a vocabulary of {vocab_size}: {message}")
