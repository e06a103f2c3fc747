"""Benchmarks: run a script from the root of the checkout, for example `python -m benchmarks.server.bench --help`."""
