"""Training an encoder on a CPU: its layers, run once where they stay as they are, and the loop."""
