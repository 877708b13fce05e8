"""How the model is spread: devices, topology, training step, optimizer, sharded checkpoints."""
