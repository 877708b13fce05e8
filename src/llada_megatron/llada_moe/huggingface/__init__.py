"""Checkpoints in the formats of Hugging Face: their files, their names, and the code an export carries."""
