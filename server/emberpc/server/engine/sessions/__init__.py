"""Inference engines, one module for each."""
