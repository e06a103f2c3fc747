"""Read a source model: find its folder, read its settings and weights."""
