"""Read the source of an export: find its folder, and read its settings and weights."""
