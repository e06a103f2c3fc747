"""Measure the graph with many equal or nearly equal vectors: self-recall, recall@10 and build time.

    python benchmarks/equal_vectors.py

Self-recall is the share of the vectors that a search for them finds; an equal
score counts. Both recalls are of the other vectors, at the given ef.
"""

from __future__ import annotations

import argparse
from time import process_time

import numpy as np

from emberpc.server.index.graph import Graph
from emberpc.server.index.metric import nearest, prepare
from emberpc.server.index.types import CollectionSpec, Distance, Matrix

_BATCH = 16
_DIMENSIONS = 384


def corpora(count: int) -> dict[str, tuple[Matrix, int]]:
    """Return vectors, the first of which are clustered, and how many those are, by the name of the corpus."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, count // 30), _DIMENSIONS), dtype=np.float32)
    noise = rng.standard_normal((3 * count, _DIMENSIONS), dtype=np.float32)
    others = centres[rng.integers(len(centres), size=3 * count)] + 0.6 * noise
    mean = centres[0]
    found = {"ordinary": (others, 3 * count)}
    for sigma in (0.0, 0.001, 0.01, 0.1):
        near = mean + sigma * rng.standard_normal((2 * count, _DIMENSIONS), dtype=np.float32)
        name = f"two thirds near one mean, noise {sigma}" if sigma else "two thirds equal"
        found[name] = (np.vstack([others[:count], near]), count)
    return found


def measure(vectors: Matrix, others: int, ef: int) -> tuple[float, float, float]:
    """Return self-recall and recall@10 of the first `others` vectors, and CPU seconds of the build."""
    order = np.random.default_rng(1).permutation(len(vectors))
    vectors = prepare(vectors, Distance.COSINE)
    shuffled = np.ascontiguousarray(vectors[order])
    graph = Graph(CollectionSpec("c", _DIMENSIONS), len(vectors))
    start = process_time()
    for first in range(0, len(vectors), _BATCH):
        part = slice(first, first + _BATCH)
        graph.add(np.arange(len(vectors), dtype=np.int64)[part], shuffled[part])
    seconds = process_time() - start
    graph.set_ef(ef)
    queries = vectors[:others]
    _, scores = graph.search(queries, 10)
    _, truth = nearest(queries, vectors, 10, Distance.COSINE)
    own = float(np.mean(scores[:, 0] >= truth[:, 0] - 1e-5))
    return own, float(np.mean(scores >= truth[:, 9:] - 1e-5)), seconds


def main() -> None:
    """Print a line for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1500, help="clustered vectors; as many again twice are alike")
    parser.add_argument("--ef", type=int, default=200)
    arguments = parser.parse_args()
    for name, (vectors, others) in corpora(arguments.count).items():
        own, recall, seconds = measure(vectors, others, arguments.ef)
        print(f"{name}: self-recall {own:.3f}, recall@10 {recall:.3f}, build {seconds:.2f} CPU s")


if __name__ == "__main__":
    main()
