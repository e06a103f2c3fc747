"""Training of an encoder on a CPU: frozen layers that run once, checkpoints, and the training loop."""
