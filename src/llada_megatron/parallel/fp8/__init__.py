"""FP8 through Transformer Engine: what a recipe needs, what it remembers, and weights that are kept in it."""
