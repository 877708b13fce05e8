"""Sampling with a model that is spread over ranks, from prompts to texts."""
