"""The pretraining engine: method and data to checkpoints."""
