"""Variants of a bundle's graph: make them from fp32, measure their accuracy and speed, and choose which to keep."""

from emberpc.export.variants.candidates import CANDIDATES, Candidate
from emberpc.export.variants.selection import add_variants

__all__ = ["CANDIDATES", "Candidate", "add_variants"]
