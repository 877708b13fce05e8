"""Training batches of the small language: LLaDA's fine-tuning loss, and tokens to be put right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.tools.bench.sampling.language import Language

_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Lessons:
    """Which batch a step number stands for.

    Prompts stay visible. Of a response, each token is masked with a probability p drawn per sequence from U(epsilon, 1)
    and supervised with the weight 1/p (LLaDA, arXiv 2502.09992, equation 5). In a share of the sequences, some of the
    tokens that stay visible are replaced by other words of the language, and all visible ones are supervised with the
    weight 1: the model learns to tell which tokens are wrong and what they should be (the token-to-token training of
    LLaDA2.1).
    """

    language: Language
    sequences: int
    """Of a batch."""
    length: int
    """Positions of each."""
    window: int | None
    """Positions of a response, filled up with end-of-text tokens, that the model sees at once; the rest of the sequence
    is kept apart from it. None = all to the end of the sequence."""
    edited_sequences: float
    """Share of the sequences with wrong tokens; 0 = none."""
    edited_tokens: float
    """Share of the visible response tokens that are wrong in those sequences."""
    seed: int
    epsilon: float = 1e-3

    def batch(self, step: int) -> Batch:
        """The batch of a step, `sequences` rows of `length` positions."""
        draw = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + step)
        labels, response, boundaries = self._texts(step)
        ratio = self.epsilon + (1 - self.epsilon) * torch.rand(self.sequences, 1, generator=draw)
        masked = response & (torch.rand(labels.shape, generator=draw) < ratio)
        inputs = labels.masked_fill(masked, self.language.mask_id)
        weights = masked / ratio
        if self.edited_sequences:
            edited = torch.rand(self.sequences, 1, generator=draw) < self.edited_sequences
            visible = edited & response & ~masked
            wrong = visible & (torch.rand(labels.shape, generator=draw) < self.edited_tokens)
            words = torch.randint(len(self.language.words), labels.shape, generator=draw)
            inputs, weights = torch.where(wrong, words, inputs), torch.where(visible, 1.0, weights)
        return Batch(
            inputs=inputs,
            labels=labels,
            weights=weights,
            boundaries=boundaries,
            mask_ratio=ratio[:, 0],
            live=torch.full((self.sequences,), self.length),
            answer=response.sum(dim=1),
        )

    def _texts(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens and which of them belong to a response, both `[batch, seq]`, and the attention's boundaries."""
        tokens = torch.full((self.sequences, self.length), self.language.eos_id)
        response = torch.zeros(tokens.shape, dtype=torch.bool)
        offsets = [0]
        for row in range(self.sequences):
            example = self.language.example(self.seed * _SEED_STRIDE + step * self.sequences + row)
            start, text = len(example.prompt), example.prompt + example.response
            stop = self.length if self.window is None else start + self.window
            tokens[row, : len(text)] = torch.tensor(text)
            response[row, start:stop] = True
            offsets += sorted({row * self.length + stop, (row + 1) * self.length})
        return tokens, response, torch.tensor(offsets, dtype=torch.int32)
