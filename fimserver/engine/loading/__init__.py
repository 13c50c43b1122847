"""Read checkpoints of any supported format into a model."""
