"""Benchmarks of exported models: variants, fine-tuning and classifiers."""
