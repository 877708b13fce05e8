"""The Transformer, from Megatron-Core modules."""
