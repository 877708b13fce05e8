"""The sampling presets beside the samplers of LLaDA and Fast-dLLM, from clones of both projects.

Everything is measured as in `llada bench sample`, whose options this command has too. The other projects' own code runs
on the same weights, and LLaDA's generate.py is the reference of all times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import main
from llada_megatron.tools.bench import Claim, sample

if TYPE_CHECKING:
    from benchmarks.peers import PeerSamplers
    from llada_megatron.tools.bench.sampling.candidates import Candidate, Generated, PeerCandidates

BLOCK_LENGTH, THRESHOLD, FACTOR = 32, 0.9, 1.0
"""What both projects' samplers run with: their published settings, which the presets of the same names have too."""
FIXED_STEPS, DUAL_CACHE = "LLaDA's generate.py", "Fast-dLLM's own: dual cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llada bench sample`, and where the clones are."""
    sample.add_options(parser)
    parser.add_argument("--peers", type=Path, metavar="DIR", required=True, help="holds clones of Fast-dLLM and LLaDA")


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures all presets and both projects' samplers, prints a table of them, and returns the claims."""
    from llada_megatron.parallel import device

    device.install()
    from benchmarks.peers import import_peers, load_peers

    import_peers(args.peers)  # what is missing is said before anything is trained
    return sample.measure_candidates(args, lambda model, count: peer_candidates(load_peers(args.peers, model), count))


def peer_candidates(peers: PeerSamplers, new_tokens: int) -> PeerCandidates:
    """The samplers of both projects; one sequence at a time, since their caches know no batches."""
    from llada_megatron.tools.bench.sampling.candidates import Candidate, PeerCandidates

    def candidate(name: str, answer: Callable[[Sequence[int]], Generated]) -> Candidate:
        return Candidate(name, lambda prompts: [answer(prompt) for prompt in prompts], plotted=True, peer=True)

    common = {"new_tokens": new_tokens, "block_length": BLOCK_LENGTH}
    by_threshold = common | {"threshold": THRESHOLD}
    others = [
        candidate("Fast-dLLM's own: prefix cache", lambda p: peers.fast_dllm(p, cache="prefix", **by_threshold)),
        candidate("Fast-dLLM's own: no cache", lambda p: peers.fast_dllm(p, cache="none", **by_threshold)),
    ]
    if peers.has_factor:
        name = "Fast-dLLM's own: dual cache, factor"
        others.append(candidate(name, lambda p: peers.fast_dllm(p, cache="dual", factor=FACTOR, **common)))
    return PeerCandidates(
        candidate(FIXED_STEPS, lambda p: peers.llada(p, steps=new_tokens, **common)),
        candidate(DUAL_CACHE, lambda p: peers.fast_dllm(p, cache="dual", **by_threshold)),
        others,
    )


if __name__ == "__main__":
    sys.exit(main("sample", sys.modules[__name__]))
