"""Measure searches among many equal or nearly equal vectors: self-recall, recall@10, CPU time of the build and search.

    python benchmarks/equal_vectors.py

Each corpus goes into a collection of an index in a temporary folder, in random
order, and is searched at the default `ef` of the server, as measured of that
collection. Self-recall is the share of the vectors that a search for them
finds; an equal score counts in both recalls. "others" are the vectors that are
not among the many alike, "alike" a sample of those.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import process_time, sleep

import numpy as np

from emberpc.server.index import Collection, CollectionSpec, Distance, Index, NewRecord
from emberpc.server.index.graph import Graph
from emberpc.server.index.metric import nearest, prepare
from emberpc.server.index.types import Matrix

_BATCH = 16
_DIMENSIONS = 384
_WRITE = 1000
_QUERIES = 1000


def backgrounds(count: int) -> dict[str, Matrix]:
    """Return vectors in clusters, in none, and as an encoder gives them, by the name of the background."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, count // 30), _DIMENSIONS), dtype=np.float32)
    noise = rng.standard_normal((count, _DIMENSIONS), dtype=np.float32)
    # Encoders give vectors with a mean, a spectrum that falls off, and topics of unlike sizes.
    spectrum = (np.arange(1, _DIMENSIONS + 1) ** -0.5).astype(np.float32)
    topics = rng.standard_normal((max(1, count // 50), _DIMENSIONS), dtype=np.float32)
    topic = (rng.pareto(1.0, count) * 3).astype(np.int64) % len(topics)
    real = (0.7 * topics[topic] + noise) * spectrum + 0.5 * spectrum[0]
    return {
        "clustered": centres[rng.integers(len(centres), size=count)] + 0.6 * noise,
        "unclustered": noise,
        "real": real,
    }


def corpora(count: int) -> dict[str, tuple[Matrix, int]]:
    """Return vectors, the first of which are background, and how many those are, by the name of the corpus."""
    rng = np.random.default_rng(1)
    found = {f"{name} only": (others, 3 * count) for name, others in backgrounds(3 * count).items()}
    for name, others in backgrounds(count).items():
        length = np.linalg.norm(others[0]) / _DIMENSIONS**0.5
        for sigma in (0.0, 0.001, 0.01, 0.1):
            noise = rng.standard_normal((2 * count, _DIMENSIONS), dtype=np.float32)
            alike = others[0] + np.float32(sigma * length) * noise
            what = f"near one mean, noise {sigma}" if sigma else "equal"
            found[f"{name}, two thirds {what}"] = (np.vstack([others, alike]), count)
    return found


def build_seconds(vectors: Matrix) -> float:
    """Return CPU seconds of the graph alone."""
    prepared = prepare(vectors, Distance.COSINE)
    graph = Graph(CollectionSpec("c", _DIMENSIONS))
    labels = np.arange(1, len(vectors) + 1, dtype=np.int64)
    start = process_time()
    for first in range(0, len(vectors), _BATCH):
        graph.add(labels[first : first + _BATCH], prepared[first : first + _BATCH])
    return process_time() - start


def recalls(collection: Collection, vectors: Matrix, queries: Matrix, ef: int) -> tuple[float, float, int, float]:
    """Return self-recall, recall@10, the ef of the searches, and CPU microseconds of each."""
    _, truth = nearest(prepare(queries, Distance.COSINE), prepare(vectors, Distance.COSINE), 10, Distance.COSINE)
    start = process_time()
    outcomes = [collection.search(query[None], 10, ef=ef)[0] for query in queries]
    seconds = process_time() - start
    scores = np.array([[score for _, score in outcome.hits] for outcome in outcomes])
    own = float(np.mean(scores[:, 0] >= truth[:, 0] - 1e-5))
    at_ten = float(np.mean(scores >= truth[:, 9:] - 1e-5))
    return own, at_ten, outcomes[0].plan.ef, 1e6 * seconds / len(queries)


def measure(name: str, vectors: Matrix, others: int, ef: int) -> None:
    """Print what is measured of one corpus."""
    order = np.random.default_rng(2).permutation(len(vectors))
    shuffled = np.ascontiguousarray(vectors[order])
    print(f"{name}: build {build_seconds(shuffled):.2f} CPU s", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder), buffer_limit=8)
        collection = index.create(CollectionSpec("c", _DIMENSIONS))
        for first in range(0, len(vectors), _WRITE):
            part = shuffled[first : first + _WRITE]
            collection.upsert([NewRecord(f"r{first + i}") for i in range(len(part))], part)
        while collection.search(shuffled[:1], 1)[0].plan.compared_count:
            sleep(0.1)
        # What the index does in its own thread meanwhile; this waits for it.
        collection.maintain()
        every = {"others": vectors[:others], "alike": vectors[others:]}
        for what, queries in every.items():
            if len(queries):
                chosen = np.linspace(0, len(queries) - 1, min(_QUERIES, len(queries))).astype(np.int64)
                own, at_ten, used, micros = recalls(collection, vectors, queries[chosen], ef)
                print(f"; {what}: self-recall {own:.3f}, recall@10 {at_ten:.3f}, ef {used}, {micros:.0f} us", end="")
        print(flush=True)
        index.close()


def main() -> None:
    """Print a line for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1500, help="background vectors; as many again twice are alike")
    parser.add_argument("--ef", type=int, default=0, help="candidates of a search; 0: the default of the server")
    parser.add_argument("--only", default="", help="measure the corpora with this in their names")
    arguments = parser.parse_args()
    for name, (vectors, others) in corpora(arguments.count).items():
        if arguments.only in name:
            measure(name, vectors, others, arguments.ef)


if __name__ == "__main__":
    main()
