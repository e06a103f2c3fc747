"""The bundle: a folder that holds a model ready to be served.

`emberpc.export` writes bundles and `emberpc.server` reads them. Both import this package, and neither imports the
other. This package needs the standard library and numpy only. It reads foreign folders, too.
"""

from emberpc.bundle.bounds import Bound, cosines
from emberpc.bundle.decision import DecisionRule, LabelDecisions, best_labels, probabilities
from emberpc.bundle.errors import BundleError, UnstatedError
from emberpc.bundle.foreign import PROBES, Stated, open_bundle
from emberpc.bundle.head import Head, unit
from emberpc.bundle.interface import Graph, Interface, Tensor, find_inputs
from emberpc.bundle.manifest import FileEntry, Manifest, Measured, Parity, Prompts, Task, Variant
from emberpc.bundle.reading import Bundle, read_bundle
from emberpc.bundle.reference import Reference
from emberpc.bundle.scope import RejectionScore, ScopeVectors, rejection_scores
from emberpc.bundle.writing import check_target, finish_bundle, staged_folder

__all__ = [
    "PROBES",
    "Bound",
    "Bundle",
    "BundleError",
    "DecisionRule",
    "FileEntry",
    "Graph",
    "Head",
    "Interface",
    "LabelDecisions",
    "Manifest",
    "Measured",
    "Parity",
    "Prompts",
    "Reference",
    "RejectionScore",
    "ScopeVectors",
    "Stated",
    "Task",
    "Tensor",
    "UnstatedError",
    "Variant",
    "best_labels",
    "check_target",
    "cosines",
    "find_inputs",
    "finish_bundle",
    "open_bundle",
    "probabilities",
    "read_bundle",
    "rejection_scores",
    "staged_folder",
    "unit",
]
