"""The options that say how a likelihood is measured, which the commands of `llada eval` share."""

from __future__ import annotations

import argparse

from llada_megatron.llada_moe.evaluation.protocol import MEANING, LikelihoodProtocol

_STRATUM = 8


def add_protocol(parser: argparse.ArgumentParser, samples: int = 128, chains: bool = True) -> None:
    """Add the options that `protocol_of` reads beside `--guidance` and `--seed`. Not `chains`: only the bound."""
    group = parser.add_argument_group("how likelihood is measured")
    if chains:
        group.add_argument(
            "--estimator", choices=list(MEANING), help="bound (default), or next-token of a model that learnt it"
        )
    text = f"masks drawn for an answer ({samples})"
    group.add_argument("--samples", type=int, default=samples, metavar="N", help=text)
    text = f"samples whose numbers of masks are spread evenly ({_STRATUM}, or all if they are fewer)"
    group.add_argument("--stratum", type=int, metavar="N", help=text)


def protocol_of(args: argparse.Namespace, shared_masks: bool = True) -> LikelihoodProtocol:
    """The protocol of the command line. Raises ConfigError for a setting that cannot be."""
    samples = LikelihoodProtocol.samples if args.samples is None else args.samples
    return LikelihoodProtocol(
        estimator=getattr(args, "estimator", "bound"),
        samples=samples,
        stratum=min(_STRATUM, max(1, samples)) if args.stratum is None else args.stratum,
        guidance=args.guidance,
        seed=args.seed,
        shared_masks=shared_masks,
    )
