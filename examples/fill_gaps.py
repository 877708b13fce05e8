"""Fill the gaps of a text with a trained checkpoint: python examples/fill_gaps.py runs/demo 'for i in <mask:2>(10):'"""

from __future__ import annotations

import sys

from llada_megatron import Prompt, Sampler


def main(checkpoint: str, text: str) -> None:
    """Print each step's new tokens with their probabilities, and then the whole text."""
    with Sampler.open(checkpoint) as sampler:
        for step in sampler.steps([Prompt.with_gaps(text)]):
            for one in step.written:
                print(f"step {step.number}: {one.piece!r} at position {one.position}, probability {one.confidence:.2f}")
            for result in step.finished:
                print(result.text)


if __name__ == "__main__":
    main(*sys.argv[1:3])
