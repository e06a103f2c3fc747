"""Variants of a bundle's graph: what can be made of the fp32 one, what that costs and gains, and what is kept."""

from emberpc.export.variants.candidates import CANDIDATES, Candidate
from emberpc.export.variants.choosing import AUTO, FP32, add_variants, check_names

__all__ = ["AUTO", "CANDIDATES", "FP32", "Candidate", "add_variants", "check_names"]
