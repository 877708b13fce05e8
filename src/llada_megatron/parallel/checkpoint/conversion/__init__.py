"""Sharded checkpoints read and written slice by slice, without process groups: what conversion needs."""
