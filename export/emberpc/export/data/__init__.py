"""Read labelled examples and texts."""
