"""What the model is: configuration, Transformer, diffusion, data, sampling, evaluation. Knows nothing of ranks."""
