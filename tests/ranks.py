"""Ranks for tests: see `llada_megatron.parallel.ranks`."""

from llada_megatron.parallel.ranks import PRELOADED, RankFailure, run_ranks

PRELOADED += ["hypothesis.strategies", "pytest"]  # what a module of tests begins with, and each of its ranks imports

__all__ = ["RankFailure", "run_ranks"]
