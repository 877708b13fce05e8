"""LLaDA-MoE on Megatron-Core: training and sampling of masked diffusion language models."""

__version__ = "0.1.0"
