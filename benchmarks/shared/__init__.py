"""Modules that benchmarks share: load and measurements, data in BEIR's format, hiding AVX-512 from a command."""
