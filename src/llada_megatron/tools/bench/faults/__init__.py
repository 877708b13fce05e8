"""Runs on a private SLURM that things are done to: for `llada bench chaos` and the tests on a real SLURM."""
