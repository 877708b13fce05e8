"""`llada bench loss`: the output layer and loss on the masked rows, in chunks, against computing all logits.

Memory is the largest sum of live bytes above the inputs during forward and backward, from the allocator's own events
(CPU: the profiler's memory events; CUDA: the caching allocator), because the resident set of a process hides the ratio.
The reference computes the logits of all rows and Megatron's vocabulary-parallel cross-entropy, which works in place and
so needs about a third of what torch.nn.functional.cross_entropy does: the comparison is the less flattering one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_most, reported

if TYPE_CHECKING:
    import torch

    from llada_megatron.llada_moe.model.head import Targets

MEMORY_GOAL = 0.5  # half of the rows are masked: what leaving out the others alone would give
EXACT_GOAL = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the problem."""
    parser.add_argument("--vocab", type=int, default=157184, help="rows of the output layer (default: LLaDA-MoE's)")
    parser.add_argument("--tokens", type=int, default=4096, help="positions, half of them masked (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden features (default %(default)s)")
    parser.add_argument("--chunk-mb", type=int, default=256, help="training.logits_chunk_mb (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved timings of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")


@dataclass
class Problem:
    """Inputs of the loss and the two ways to compute it; each returns the loss of a sequence, `[batch]`."""

    model: Any
    hidden: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: Targets
    """The same labels and weights, of the masked rows alone."""
    chunk_elements: int

    def chunked(self) -> torch.Tensor:
        """What training runs."""
        from llada_megatron.llada_moe.model.head import supervised_loss

        return supervised_loss(self.model, self.hidden, self.targets, self.chunk_elements)

    def all_logits(self) -> torch.Tensor:
        """The logits of every row, then the same cross-entropy and weights."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        logits, _ = self.model.output_layer(self.hidden)
        losses = vocab_parallel_cross_entropy(logits, self.labels.t().contiguous())
        return (losses * self.weights.t()).sum(dim=0)

    def gradients(self, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forward and backward: the loss and the gradients of the hidden states and of the output layer."""
        self.clear()
        value = loss()
        value.sum().backward()
        return value.detach(), self.hidden.grad, self.model.output_layer.weight.grad

    def clear(self) -> None:
        """Releases the gradients."""
        self.hidden.grad = self.model.output_layer.weight.grad = None


def run(args: argparse.Namespace) -> list[Claim]:
    """Measures memory, time and the difference of the results."""
    import torch

    from llada_megatron.tools.bench.measurement import single_process

    if args.threads:
        torch.set_num_threads(args.threads)
    with single_process():
        message(f"{args.tokens} tokens, half masked, vocabulary {args.vocab}, hidden {args.hidden}, fp32")
        found = figures(args)
    size = f"at vocabulary {args.vocab:,} and {args.tokens:,} tokens"
    return [
        at_most(f"peak memory of the loss {size}, against computing all logits", found["memory"], "x", MEMORY_GOAL),
        reported(f"peak memory of the loss {size}, masked rows in chunks", found["chunked_mib"], "MiB"),
        reported(f"peak memory of the loss {size}, all logits", found["all_logits_mib"], "MiB"),
        at_most("largest relative difference of the loss and its gradients", found["difference"], "", EXACT_GOAL),
        reported("time of the loss, forward and backward, against computing all logits", found["time"], "x"),
    ]


def figures(args: argparse.Namespace, kernel: str | None = None) -> dict[str, float]:
    """Peak memory of both ways and their ratio, the difference of their results, and the ratio of their times.

    Args:
        args: the values of the options but `threads`; the process groups of one process exist.
        kernel: what computes the cross-entropy of a chunk (see `llada_moe.model.cross_entropy`): "te" or "native";
            None = operations of their own.
    """
    problem = _problem(args)
    if kernel is not None:
        problem.model.config.cross_entropy_loss_fusion = True
        problem.model.config.cross_entropy_fusion_impl = kernel
    peaks = {name: _peak(problem, loss) for name, loss in _ways(problem).items()}
    message("  ".join(f"{name}: {peak / 2**20:.0f} MiB" for name, peak in peaks.items()))
    return {
        "memory": peaks["chunked"] / peaks["all_logits"],
        **{f"{name}_mib": peak / 2**20 for name, peak in peaks.items()},
        "difference": _difference(problem),
        "time": _time_ratio(problem, args.repeats),
    }


def _ways(problem: Problem) -> dict[str, Callable[[], torch.Tensor]]:
    return {"chunked": problem.chunked, "all_logits": problem.all_logits}


def _peak(problem: Problem, loss: Callable[[], torch.Tensor]) -> int:
    from llada_megatron.tools.bench.measurement import peak_bytes

    problem.clear()  # what an earlier run left would count as released by this one
    return peak_bytes(lambda: problem.gradients(loss))


def _problem(args: argparse.Namespace) -> Problem:
    import torch

    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.model.head import Targets
    from llada_megatron.llada_moe.model.transformer import build_model
    from llada_megatron.parallel.build import transformer_config

    model = ModelConfig(
        family="llada",
        num_layers=1,
        hidden_size=args.hidden,
        ffn_hidden_size=args.hidden,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=args.hidden,
        vocab_size=args.vocab,
        max_sequence_length=args.tokens,
        mask_token_id=1,
        eos_token_id=0,
    )
    built = build_model(model, transformer_config(model, LayoutConfig()))
    generator = torch.Generator().manual_seed(0)
    sequences, length = 2, args.tokens // 2
    masked = torch.rand(sequences, length, generator=generator).argsort(dim=1) < length // 2
    device = built.output_layer.weight.device
    hidden = torch.randn(length, sequences, args.hidden, generator=generator).to(device).requires_grad_()
    labels = torch.randint(args.vocab, (sequences, length), generator=generator)
    weights = masked * 2.0 / args.tokens
    targets = Targets.of(labels, weights).to(device)
    return Problem(built, hidden, labels.to(device), weights.to(device), targets, args.chunk_mb * 2**20 // 4)


def _difference(problem: Problem) -> float:
    """Largest difference of the three results, relative to the largest entry of each."""
    return largest_difference(problem.gradients(problem.chunked), problem.gradients(problem.all_logits))


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest of max |a - b| / max |b| over the pairs; NaN, which no goal allows, where one of the entries is NaN."""
    import torch

    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]).max())


def _time_ratio(problem: Problem, repeats: int) -> float:
    """Median over interleaved pairs of the time of `chunked` divided by that of `all_logits`."""

    def seconds(loss: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        float(problem.gradients(loss)[0].sum())  # waits for the device
        return time.perf_counter() - start

    return statistics.median(seconds(problem.chunked) / seconds(problem.all_logits) for _ in range(repeats))
