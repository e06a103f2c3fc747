"""Measure searches among equal, nearly equal or uneven vectors: self-recall, recall@10, CPU time of build and search.

    python -m benchmarks.index.equal_vectors

The time of the build is that of a graph in memory, without a collection. Then each corpus is inserted into a collection
in random order, and searched with `--ef` or the server's default `ef` for that collection. The queries are vectors of
the corpus. Self-recall is the share of the queries whose best hit scores as high as the true nearest vector. In
recall@10, a hit counts if it scores at least as high as the true tenth nearest vector. Rounding is allowed for.

A line has figures for "alike", a sample of the vectors that are equal or nearly equal, and for "others", a sample of
the remaining vectors; a corpus without alike vectors has only "others". Uneven vectors have different densities: around
one mean, around a single zero vector, of many lengths, or very short.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import process_time

import numpy as np

from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Matrix
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph.persistent_graph import PersistentGraph

_BATCH = 16
_DIMENSIONS = 384
_UNEVEN_DIMENSIONS = 64
_WRITE = 1000
_QUERIES = 1000


def backgrounds(count: int) -> dict[str, Matrix]:
    """Return `count` vectors of each of three kinds by name, float32 (count, 384), not normalized.

    `clustered` vectors are in clusters of about 30, `unclustered` vectors are in none, and the distribution of `real`
    vectors is like that of an encoder's vectors.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, count // 30), _DIMENSIONS), dtype=np.float32)
    noise = rng.standard_normal((count, _DIMENSIONS), dtype=np.float32)
    # Vectors of encoders have a mean that is not zero, components of different variance (a falling spectrum), and
    # topics of different sizes.
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
    """Return corpora of 3 * `count` vectors by name, each with the number of its background vectors, which come first.

    A corpus has background vectors only, or `count` of them and then 2 * `count` vectors that are equal to the first
    background vector or near it. The vectors are float32 (3 * `count`, 384).
    """
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


def uneven(count: int) -> dict[str, tuple[Matrix, Distance]]:
    """Return corpora of 4 or 6 times `count` vectors of different densities by name, each with its distance.

    Searches of a plain HNSW graph, without shells, would miss many of these vectors. The vectors are float32 (n, 64).
    """
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((6 * count, _UNEVEN_DIMENSIONS), dtype=np.float32)
    direction = noise[0] / np.linalg.norm(noise[0])
    lengths = np.repeat([0.003, 0.01, 0.02, 0.05, 0.1, 1], count)[:, None] / _UNEVEN_DIMENSIONS**0.5
    hub = noise[: 4 * count].copy()
    hub[0] = 0
    scales = np.exp(1.5 * rng.standard_normal((4 * count, 1)))
    return {
        "uneven, one mean": ((direction + lengths * noise).astype(np.float32), Distance.COSINE),
        "uneven, one zero vector": (hub, Distance.EUCLIDEAN),
        "uneven, many lengths": ((noise[: 4 * count] * scales).astype(np.float32), Distance.EUCLIDEAN),
        "uneven, very short": (noise[: 4 * count] * np.float32(1e-12), Distance.DOT_PRODUCT),
    }


def build_seconds(vectors: Matrix, distance: Distance) -> float:
    """Build a graph of the vectors in memory, without a collection; return the CPU seconds of this process."""
    prepared = prepare(vectors, distance)
    graph = PersistentGraph(CollectionSpec("c", vectors.shape[1], distance=distance))
    labels = np.arange(1, len(vectors) + 1, dtype=np.int64)
    start = process_time()
    for first in range(0, len(vectors), _BATCH):
        graph.add(labels[first : first + _BATCH], prepared[first : first + _BATCH])
    return process_time() - start


def recalls(collection: Collection, vectors: Matrix, queries: Matrix, ef: int) -> tuple[float, float, int, float]:
    """Search for the 10 vectors nearest to each query.

    Args:
        collection: the collection.
        vectors: the vectors of the collection, float32 (records, dimensions).
        queries: the queries, float32 (queries, dimensions).
        ef: the `ef` of the searches; 0: the server's default.

    Returns:
        Self-recall (share of the queries whose best hit scores as high as the nearest vector), recall@10, the `ef` that
        the first search used, and the mean CPU microseconds of a search.
    """
    distance = collection.spec.distance
    _, truth = nearest(prepare(queries, distance), prepare(vectors, distance), 10, distance)
    start = process_time()
    outcomes = [collection.search(query[None], 10, ef=ef)[0] for query in queries]
    seconds = process_time() - start
    scores = np.array([[score for _, score in outcome.hits] for outcome in outcomes])
    # A hit may score lower than the true vector by 1e-5 of the greatest magnitude of the query's true scores: the last
    # digits of a score depend on how the score is computed.
    bounds = truth - 1e-5 * np.abs(truth).max(axis=1, keepdims=True)
    own = float(np.mean(scores[:, 0] >= bounds[:, 0]))
    at_ten = float(np.mean(scores >= bounds[:, 9:]))
    return own, at_ten, outcomes[0].plan.ef, 1e6 * seconds / len(queries)


def measure(name: str, vectors: Matrix, others: int, ef: int, distance: Distance = Distance.COSINE) -> None:
    """Measure one corpus, and print a line with its figures.

    Args:
        name: name of the corpus.
        vectors: vectors of the corpus, float32 (n, dimensions).
        others: number of background vectors, which come first; the other vectors are alike.
        ef: the `ef` of the searches; 0: the server's default.
        distance: distance of the collection.
    """
    order = np.random.default_rng(2).permutation(len(vectors))
    shuffled = np.ascontiguousarray(vectors[order])
    print(f"{name}: build {build_seconds(shuffled, distance):.2f} CPU s", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder), buffer_limit=8)
        collection = index.create(CollectionSpec("c", vectors.shape[1], distance=distance))
        for first in range(0, len(vectors), _WRITE):
            part = shuffled[first : first + _WRITE]
            collection.upsert([NewRecord(f"r{first + i}") for i in range(len(part))], part)
        # The maintenance thread of the index may be at work already. This call waits for the thread, and then does the
        # remaining work.
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
    """Measure the corpora that `--only` selects, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1500, help="background vectors; twice as many are alike")
    parser.add_argument("--ef", type=int, default=0, help="candidates of a search; 0: the default of the server")
    parser.add_argument("--only", default="", help="measure only corpora whose names contain this")
    arguments = parser.parse_args()
    for name, (vectors, others) in corpora(arguments.count).items():
        if arguments.only in name:
            measure(name, vectors, others, arguments.ef)
    for name, (vectors, distance) in uneven(arguments.count).items():
        if arguments.only in name:
            measure(name, vectors, len(vectors), arguments.ef, distance)


if __name__ == "__main__":
    main()
