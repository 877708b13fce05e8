"""From prompts to requests: prompts are encoded, and those that the model cannot sample are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import Tokenizer, encode_long
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation, infilling
from llada_megatron.parallel.sampling.prompts import Gap, Piece, Prompt, require_text


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the requests of prompts for one model and one sampling method."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    """None = prompts can only be token ids."""
    max_new_tokens: int
    """New tokens of a continuation that does not specify them itself."""
    block_length: int | None
    """Positions of a block; None = one single block."""
    grid: int | None
    """Block size of a block-causal model; None for a bidirectional one."""
    continues_only: bool = False
    """The method decodes from left to right: it cannot fill gaps, nor begin a text."""

    def build(self, prompt: Prompt) -> Request:
        """The request of a prompt; its stream is the number of the prompt minus one.

        Raises:
            ConfigError: the prompt is too long for the model, has an id that the model does not have, has only empty
                gaps, or is one that the method cannot write.
            DataError: the prompt is a text and there is no tokenizer, or it is not UTF-8 text.
        """
        pieces = [(self._ids(piece, prompt, i > 0), isinstance(piece, Gap)) for i, piece in enumerate(prompt.pieces)]
        stream = prompt.number - 1
        if self.continues_only:
            _require_continuation(prompt, any(ids for ids, _ in pieces))
        if not prompt.infilling:
            tokens = [token for ids, _ in pieces for token in ids]
            new = self.max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
            self._require_room(len(tokens), new, prompt)
            return continuation(tokens, new, self.block_length, stream, self.grid)
        self._require_length(sum(len(ids) for ids, _ in pieces), prompt)
        tokens = [token for ids, _ in pieces for token in ids]
        gaps = [gap for ids, gap in pieces for _ in ids]
        if not any(gaps):
            raise ConfigError(f"{prompt}: there is nothing to fill, the text that is cut out has no tokens")
        return infilling(tokens, gaps, self.block_length, stream, self.grid)

    def _ids(self, piece: Piece, prompt: Prompt, continues: bool) -> Sequence[int]:
        """Token ids of a piece, which may continue another; for a gap as many arbitrary ids as it has tokens."""
        if isinstance(piece, Gap) and piece.tokens is not None:
            return range(piece.tokens)  # not a list, because the number may be huge and its check comes later
        if isinstance(piece, tuple):
            wrong = next((i for i in piece if not 0 <= i < self.model.vocab_size), None)
            if wrong is not None:
                raise ConfigError(
                    f"{prompt}: the model has no token {wrong}, its ids are 0 to {self.model.vocab_size - 1}"
                )
            return piece
        if self.tokenizer is None:
            raise DataError(f"{prompt}: a text needs a tokenizer")
        text = piece.instead_of if isinstance(piece, Gap) else piece
        require_text(text, str(prompt))
        return encode_long(self.tokenizer, text, continues=continues)

    def _require_room(self, given: int, new: int, prompt: Prompt) -> None:
        """Refuse a continuation that does not fit the model's context with its last block filled up."""
        grid, longest = self.grid or 1, self.model.max_sequence_length
        length = -(-(given + new) // grid) * grid
        if length <= longest:
            return
        filled = f" = {given + new}" + (f", in whole blocks of {grid} = {length}" if length != given + new else "")
        left = longest // grid * grid - given
        remedy = f"at most {left} new tokens fit" if left > 0 else f"shorten the prompt by {new - left} tokens"
        raise ConfigError(
            f"{prompt}: {given} tokens and {new} new ones{filled}; the model takes {longest}, "
            f"that is {length - longest} too many: {remedy}"
        )

    def _require_length(self, length: int, prompt: Prompt) -> None:
        longest = self.model.max_sequence_length
        if length > longest:
            raise ConfigError(
                f"{prompt}: {length} tokens with the gaps; the model takes {longest}, "
                f"that is {length - longest} too many"
            )


def _require_continuation(prompt: Prompt, begun: bool) -> None:
    """Refuse what cannot be decoded from left to right."""
    if prompt.infilling:
        raise ConfigError(
            f"{prompt}: self-speculation continues texts, and does not see what stands behind a gap; fill gaps with "
            "another preset (llada2)"
        )
    if not begun:
        raise ConfigError(f"{prompt}: it is empty, and decoding token by token needs a first one; give a text")


def longest_first(requests: Sequence[Request]) -> list[Request]:
    """Requests in the order in which they run: the longest first, so that a lack of memory shows at once."""
    return sorted(requests, key=lambda request: (-len(request.tokens), request.stream))


def steps_note(request: Request, steps: int) -> str | None:
    """What happens if a number of steps cannot be divided evenly over a request, as a message; None if it can."""
    blocks, tokens = len(request.blocks), sum(request.gaps)
    sizes = [sum(request.gaps[start:end]) for start, end in request.blocks]
    shares = [max(1, steps // blocks + (block < steps % blocks)) for block in range(blocks)]
    taken = sum(map(min, shares, sizes))
    if steps < blocks:
        return f"{steps} steps for {blocks} blocks: each block takes at least one, {taken} in all"
    if taken < steps:
        return f"{steps} steps for {tokens} tokens: no block takes more steps than it has tokens, {taken} in all"
    if steps % blocks or any(size % share for size, share in zip(sizes, shares, strict=True)):
        shared = f"; the {blocks} blocks take {_some(shares)}" if blocks > 1 else ""
        return (
            f"{steps} steps do not divide {tokens} tokens{shared}: the first steps write one token more than the others"
        )
    return None


def _some(numbers: Sequence[int]) -> str:
    """`4, 3, 3`, or the first few of many."""
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
