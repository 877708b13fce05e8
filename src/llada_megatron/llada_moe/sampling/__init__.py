"""Sampling from a masked diffusion model: what fills which masks, step by step; knows no model and no ranks."""
