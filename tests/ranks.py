"""Ranks for tests: see `llada_megatron.parallel.ranks`."""

from llada_megatron.parallel.ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
