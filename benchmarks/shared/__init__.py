"""Modules that several benchmarks share: load and measurements, data in BEIR's format, a processor without AVX-512."""
