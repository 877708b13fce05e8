"""Sampling from the command line, and in batches on this machine or on a cluster."""
