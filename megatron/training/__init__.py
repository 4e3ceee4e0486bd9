"""Training: the loop, its configuration, data, checkpoints and records."""
