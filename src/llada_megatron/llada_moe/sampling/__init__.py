"""Filling in masked tokens."""
