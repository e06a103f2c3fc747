"""Benchmarks of the server: embedding under load, start, memory and hostile requests."""
