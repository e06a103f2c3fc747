"""Train an encoder on a CPU: frozen lower layers that run once for each text, checkpoints, and the training loop."""
