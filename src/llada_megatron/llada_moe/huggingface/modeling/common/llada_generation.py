"""Sampling by filling masks; imported by the modelling file beside it.

Text is sampled in blocks from left to right. A step runs the model once, and some masks of the block get their most
probable token. At temperature 0 the tokens are those of `llada sample` with the same numbers (up to the first end of
text, after which it writes nothing).

`generation_config.json` says what the weights were trained for:

- `attention_pattern`: "full"; "blocks", where a token sees its own block of `block_length` positions, counted from the
  start of the text, and all blocks before it; "causal" for an autoregressive model, which cannot fill masks; or
  "joint" for one that fills blocks of `block_length` masks behind a text that it reads causally.
- `suppress_tokens`: ids that are never sampled, because no text has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import GenerationMixin


class MaskFillingGenerationMixin(GenerationMixin):
    """What both published samplers share."""

    published_pattern: ClassVar[str]
    """The attention of the published weights, where `generation_config.json` says nothing."""

    def blocks(self, prompt: int, gen_length: int, block_length: int) -> Iterator[tuple[int, int]]:
        """First position and end of every block that holds masks, for a prompt of so many tokens."""
        start = prompt // block_length * block_length if self.block_causal() else prompt
        while start < prompt + gen_length:
            end = start + block_length
            yield start, end if self.block_causal() else min(end, prompt + gen_length)
            start = end

    def block_causal(self) -> bool:
        """Whether the weights were trained with block-causal attention. Raises ValueError: with causal attention, or
        with both."""
        pattern = getattr(self.generation_config, "attention_pattern", self.published_pattern)
        if pattern == "causal":
            raise ValueError(
                "these weights were trained autoregressively: they predict the next token and fill no masks"
            )
        if pattern == "joint":
            raise ValueError(
                "these weights fill masks behind a text that is read causally, which this function cannot do; take the "
                "next token with a causal mask (README.md), or `llada convert import` and `llada sample`"
            )
        return pattern == "blocks"

    def trained_block_length(self, block_length: int | None, published: int) -> int:
        """The block length to use. Raises ValueError: the weights were trained for blocks of another length."""
        trained = getattr(self.generation_config, "block_length", None)
        if block_length is None:
            return trained or published
        if self.block_causal() and trained not in (None, block_length):
            raise ValueError(f"block_length {block_length}: the weights were trained with blocks of {trained}")
        return block_length

    def predict(
        self,
        tokens: torch.Tensor,
        block: tuple[int, int],
        block_length: int,
        padding: torch.Tensor | None,
        mask_id: int,
        given: torch.Tensor | None = None,
        cfg_scale: float = 0.0,
    ) -> torch.Tensor:
        """Logits of a block, float32 `[batch, columns, vocab]`, with -inf for tokens that are never sampled.

        Args:
            tokens: `[batch, seq]`.
            block: first position and end.
            padding: `[batch, seq]`, 0 = padding, or None.
            given: bool `[batch, seq]`, the prompt, which is masked in the second pass of classifier-free guidance.
            cfg_scale: weight of that guidance; 0 = off.
        """
        start, end = block
        mask = padding
        if self.block_causal():
            tokens = tokens[:, :end]
            number = torch.arange(end, device=tokens.device) // block_length
            mask = (number[:, None] >= number[None, :])[None, None]
        if cfg_scale:
            without = tokens.masked_fill(given[:, : tokens.shape[1]], mask_id)
            tokens = torch.cat([tokens, without])
            mask = None if mask is None else mask.repeat(2 if mask.dim() == 2 else 1, *[1] * (mask.dim() - 1))
        hidden = self.model(tokens, attention_mask=mask, return_dict=True).last_hidden_state[:, start:end]
        logits = F.linear(hidden, self.get_output_embeddings().weight).float()
        if cfg_scale:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (cfg_scale + 1) * (conditional - unconditional)
        never = [mask_id, *(getattr(self.generation_config, "suppress_tokens", None) or ())]
        return logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf)

    def special_id(self, name: str, given: int | None) -> int:
        """The id that was given, or that of the configuration. Raises ValueError: there is none."""
        found = getattr(self.config, name, None) if given is None else given
        if found is None:
            raise ValueError(f"config.json has no {name}: give it in the call")
        return found


def only_prompt(**named: torch.Tensor | None) -> torch.Tensor:
    """The prompt `[batch, seq]`, which may have one of several names. Raises ValueError: none or two were given."""
    found = [value for value in named.values() if value is not None]
    if len(found) != 1 or found[0].dim() != 2:
        raise ValueError(f"give the token ids of the prompts, [batch, seq], as {' or '.join(named)}")
    return found[0]


def best(confidence: torch.Tensor, masked: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """In each row the `count` most confident masks, the leftmost on a tie: bool `[batch, columns]`."""
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return masked & (rank < (count if isinstance(count, int) else count[:, None]))


class FixedStepsGenerationMixin(MaskFillingGenerationMixin):
    """The sampler of LLaDA: as many steps as asked for, whatever the model is sure of."""

    published_pattern = "full"

    @torch.no_grad()
    def generate(
        self,
        prompt: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        steps: int = 128,
        gen_length: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        mask_id: int | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
        *,
        input_ids: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prompts with `gen_length` further tokens, `[batch, seq + gen_length]`.

        Args:
            prompt: token ids `[batch, seq]`, also as `input_ids` or `inputs`; shorter ones are padded on the left.
            attention_mask: `[batch, seq]`, 0 = padding.
            steps: passes through the model, divided among the blocks; `gen_length` of them fill one mask each.
            gen_length: new tokens.
            block_length: positions of a block; None = that of the training with block-causal attention, else 128.
            temperature: 0 = the most probable token; above, Gumbel noise from torch's generator times it is added.
            cfg_scale: weight of classifier-free guidance.
            remasking: "low_confidence" fills the surest masks first, "random" any.
            mask_id: the mask token; None = `config.mask_token_id`.
            logits_eos_inf: never sample the end of text.
            confidence_eos_eot_inf: fill masks with an end of text only where no other mask is left, or of a turn, where
                the configuration has an `eot_token_id`.

        Raises:
            ValueError: an argument is impossible, or the weights fill no masks.
        """
        prompt = only_prompt(prompt=prompt, input_ids=input_ids, inputs=inputs).to(self.device)
        block_length = self.trained_block_length(block_length, 128)
        if min(steps, gen_length, block_length) < 1 or remasking not in ("low_confidence", "random"):
            raise ValueError("steps, gen_length and block_length are 1 or more, remasking low_confidence or random")
        mask_id = self.special_id("mask_token_id", mask_id)
        batch, length = prompt.shape
        blocks = list(self.blocks(length, gen_length, block_length))
        total = max(blocks[-1][1], length + gen_length)
        tokens = F.pad(prompt, (0, total - length), value=mask_id)
        open_ = (torch.arange(total, device=tokens.device) >= length).expand(batch, total).clone()
        given = ~open_
        padding = self._padding(attention_mask, total)
        for index, block in enumerate(blocks):
            columns = slice(*block)
            masks = open_[:, columns].sum(1)
            count = max(1, steps // len(blocks) + (index < steps % len(blocks)))
            count = torch.minimum(torch.tensor(count, device=masks.device), masks.clamp(min=1))
            step = 0
            while open_[:, columns].any():
                logits = self.predict(tokens, block, block_length, padding, mask_id, given, cfg_scale)
                if logits_eos_inf:
                    logits[..., self.special_id("eos_token_id", None)] = -torch.inf
                noise = -(-torch.rand(logits.shape, dtype=torch.float64, device=logits.device).log()).log()
                chosen = (logits + temperature * noise if temperature else logits).argmax(-1)
                if confidence_eos_eot_inf:
                    logits = logits.index_fill(-1, self._ends(logits.device), -torch.inf)
                confidence = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
                if remasking == "random":
                    confidence = torch.rand_like(confidence)
                take = best(confidence, open_[:, columns], masks // count + (step < masks % count))
                tokens[:, columns] = chosen.where(take, tokens[:, columns])
                open_[:, columns] &= ~take
                step += 1
        return tokens[:, : length + gen_length]

    def _ends(self, device: torch.device) -> torch.Tensor:
        """Ids of the end of text and, if the configuration has it, the end of a turn."""
        turn = getattr(self.config, "eot_token_id", None)
        ends = [self.special_id("eos_token_id", None), *([] if turn is None else [turn])]
        return torch.tensor(ends, device=device)

    def _padding(self, attention_mask: torch.Tensor | None, total: int) -> torch.Tensor | None:
        """The padding of the whole text `[batch, total]`, or None. Raises ValueError: blocks would begin within it."""
        if attention_mask is None or bool(attention_mask.bool().all()):
            return None
        if self.block_causal():
            raise ValueError(
                "blocks are counted from the start of a text: sample prompts of different lengths one by one"
            )
        return F.pad(attention_mask.to(self.device), (0, total - attention_mask.shape[1]), value=1)


class ThresholdGenerationMixin(MaskFillingGenerationMixin):
    """The sampler of LLaDA2: every mask that the model is sure of, and so many that a block ends in `steps` steps."""

    published_pattern = "blocks"

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        temperature: float = 0.0,
        block_length: int | None = None,
        steps: int = 32,
        gen_length: int = 2048,
        top_p: float | None = None,
        top_k: int | None = None,
        eos_early_stop: bool = False,
        minimal_topk: int = 1,
        threshold: float = 0.95,
        eos_id: int | None = None,
        mask_id: int | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What follows the prompts, up to the first end of text, `[batch, new]`; shorter rows end in ends of text.

        Args:
            inputs: token ids `[batch, seq]`, also as `input_ids`.
            temperature: 0 = the most probable token; above, tokens are drawn with torch's generator.
            block_length: positions of a block; None = that of the training, else 32.
            steps: most passes for a block.
            gen_length: most new tokens.
            top_p: tokens are drawn from the most probable ones that have this probability together.
            top_k: tokens are drawn from so many of the most probable ones.
            eos_early_stop: end as soon as an end of text is sampled with no mask before it, within a block.
            minimal_topk: `steps` are at most gen_length // minimal_topk.
            threshold: masks whose token is more probable than this are filled at once.
            eos_id: the end of text; None = `config.eos_token_id`.
            mask_id: the mask token; None = `config.mask_token_id`.
            attention_mask: of ones; prompts of different lengths are sampled one by one.

        Raises:
            ValueError: an argument is impossible, or the weights fill no masks.
        """
        prompts = only_prompt(inputs=inputs, input_ids=input_ids).to(self.device)
        block_length = self.trained_block_length(block_length, 32)
        steps = min(steps, gen_length // minimal_topk)
        if min(steps, gen_length, block_length) < 1:
            raise ValueError("steps, gen_length, block_length and gen_length // minimal_topk are 1 or more")
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise ValueError("padding: sample prompts of different lengths one by one")
        settings = (block_length, steps, gen_length, threshold, eos_early_stop, temperature, top_k, top_p)
        eos_id, mask_id = self.special_id("eos_token_id", eos_id), self.special_id("mask_token_id", mask_id)
        rows = [self._one(prompt[None], eos_id, mask_id, *settings) for prompt in prompts]
        longest = max(len(row) for row in rows)
        return torch.stack([F.pad(row, (0, longest - len(row)), value=eos_id) for row in rows])

    def _one(self, prompt: torch.Tensor, eos_id: int, mask_id: int, *settings: Any) -> torch.Tensor:
        """What follows one prompt `[1, seq]`, up to the first end of text: `[new]`."""
        block_length, steps, gen_length, threshold, early, temperature, top_k, top_p = settings
        length = prompt.shape[1]
        blocks = list(self.blocks(length, gen_length, block_length))
        total = max(blocks[-1][1], length + gen_length)
        tokens = F.pad(prompt, (0, total - length), value=mask_id)
        open_ = (torch.arange(total, device=tokens.device) >= length)[None]
        for block in blocks:
            columns, step = slice(*block), 0
            while open_[:, columns].any():
                logits = self.predict(tokens, block, block_length, None, mask_id)
                chosen, confidence = drawn(logits, temperature, top_k, top_p)
                size = block[1] - block[0]
                floor = max(1, size // steps + (step < size % steps))
                sure = open_[:, columns] & (confidence > threshold)
                take = sure | best(confidence, open_[:, columns], floor)
                tokens[:, columns] = chosen.where(take, tokens[:, columns])
                open_[:, columns] &= ~take
                step += 1
                if early and ended(tokens, open_, length, eos_id):
                    break
            if ended(tokens, open_, length, eos_id):
                break
        answer = tokens[0, length : length + gen_length]
        end = (answer == eos_id).nonzero()
        return answer[: int(end[0]) + 1] if len(end) else answer


def ended(tokens: torch.Tensor, open_: torch.Tensor, prompt: int, eos_id: int) -> bool:
    """Whether an end of text was sampled with no mask before it; `tokens` and `open_` are `[1, seq]`."""
    ends = (tokens[0, prompt:] == eos_id).nonzero()
    return len(ends) > 0 and not bool(open_[0, prompt : prompt + int(ends[0])].any())


def drawn(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their probabilities, `[batch, columns]`, from logits `[batch, columns, vocab]`."""
    if temperature:
        logits = logits / temperature
    if top_k:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        chances = ranked.softmax(-1)
        beyond = chances.cumsum(-1) - chances > top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    chances = logits.softmax(-1)
    chosen = torch.multinomial(chances.flatten(0, 1), 1).view(chances.shape[:2]) if temperature else logits.argmax(-1)
    return chosen, chances.gather(-1, chosen[..., None])[..., 0]
