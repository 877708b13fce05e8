"""Sampling at the level of texts: prompts to results, in Python, from the command line and in batches on a cluster."""
