"""Training: data, loops, checkpoints, and the demo."""
