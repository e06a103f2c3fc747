"""Benchmarks of the server and its embeddings."""
