"""Benchmarks of the export and of exported models: variants, int8 methods, fine-tuning, classifiers and threads."""
