"""What a model learns: one objective a file."""
