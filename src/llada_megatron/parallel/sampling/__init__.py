"""Sampling with a model that is spread over ranks."""
