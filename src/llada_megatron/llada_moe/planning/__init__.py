"""What a training step needs of each rank, from sizes alone: memory, bytes sent, operations, and seconds on a GPU."""
