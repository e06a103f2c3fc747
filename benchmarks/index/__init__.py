"""Benchmarks of collections and the index."""
