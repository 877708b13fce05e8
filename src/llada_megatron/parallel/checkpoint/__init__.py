"""Sharded checkpoints: written and verified as a whole, found, and read or written tensor by tensor."""
