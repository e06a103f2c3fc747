"""Variants of a bundle's graph: make them from fp32, measure their accuracy and speed, and choose which to keep."""

from emberpc.export.variants.candidates import CANDIDATES, Candidate
from emberpc.export.variants.selection import AUTO, FP32, add_variants, check_names

__all__ = ["AUTO", "CANDIDATES", "FP32", "Candidate", "add_variants", "check_names"]
