"""Noise and objectives."""
