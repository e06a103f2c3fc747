"""What several benchmarks use: load and host measurements, BEIR data sets, a processor without AVX-512."""
