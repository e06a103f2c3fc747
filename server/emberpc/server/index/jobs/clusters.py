"""Cluster similar records by k-means over the vectors of a collection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.metric import normalized, prepare
from emberpc.server.collections.types import Cluster, CollectionSpec, Distance, Labels, Matrix
from emberpc.server.index.storage.store import Store

#: Maximum number of vectors in the random sample to which the centres are fitted: the greater of the first number and
#: the second number times the number of clusters.
_SAMPLE, _SAMPLE_PER_CLUSTER = 20_000, 50
_ROUNDS = 25
_SEED = 0
_READ_BATCH = 4000
#: Vectors of the sample that are compared with all centres at a time. With 1,000 centres the scores take 16 MB.
_ASSIGNED_AT_ONCE = 4000

Rows = npt.NDArray[np.int64]


def cluster_records(
    spec: CollectionSpec, store: Store, count: int, examples: int, stop: Callable[[], bool]
) -> list[Cluster]:
    """Cluster the records of a collection, in the state of one moment.

    The centres are fitted to a random sample of vectors, always with the same seed. Then all vectors are read, 4,000 at
    a time, and every record with an undamaged vector joins the cluster with the nearest centre.

    Args:
        spec: the spec of the collection; EUCLIDEAN collections are clustered by distance, others by direction.
        store: the records of the collection.
        count: maximum number of clusters, at least 1. Fewer are returned if some are empty, as with fewer distinct
            vectors.
        examples: maximum number of records to return of each cluster, those nearest to its centre. Damaged records
            among them are left out.
        stop: whether to stop; called by `k_means`, and before each batch of vectors.

    Returns:
        The clusters, largest first; none if stopped, or if the sample has no undamaged vector.

    Raises:
        ServiceError: the store cannot be read, or the examples have too many bytes for the response.
    """
    directions = spec.distance is not Distance.EUCLIDEAN

    def ready(matrix: Matrix) -> Matrix:
        # A zero vector has no direction, and stays zero. Its product with each centre is 0, so it joins the first
        # cluster.
        return normalized(matrix) if directions else prepare(matrix, Distance.EUCLIDEAN)

    with store.snapshot():
        labels = store.labels()
        if not len(labels):
            return []
        maximum = min(len(labels), max(_SAMPLE, _SAMPLE_PER_CLUSTER * count))
        chosen = np.sort(np.random.default_rng(_SEED).choice(labels, maximum, replace=False))
        sample = store.vectors(chosen.tolist())[1]
        if not len(sample):  # all are damaged
            return []
        centres = k_means(ready(sample), count, directions=directions, stop=stop)
        if stop():
            return []
        sizes = np.zeros(len(centres), dtype=np.int64)
        best: list[list[tuple[float, int]]] = [[] for _ in centres]
        for batch, matrix in store.vector_batches(_READ_BATCH):
            if stop():
                return []
            rows, scores = _assigned(ready(matrix), centres, directions=directions)
            sizes += np.bincount(rows, minlength=len(centres))
            _keep_nearest(best, batch, rows, scores, examples)
        records = store.by_label([label for nearest in best for _, label in nearest], with_vectors=False)
    clusters = [
        Cluster(int(size), [records[label] for _, label in nearest if label in records])
        for size, nearest in zip(sizes, best, strict=True)
        if size
    ]
    return sorted(clusters, key=lambda cluster: -cluster.record_count)


def k_means(vectors: Matrix, count: int, *, directions: bool, stop: Callable[[], bool] = lambda: False) -> Matrix:
    """Return the centres of clusters, by k-means++ (Arthur and Vassilvitskii, 2007) and Lloyd's algorithm.

    Lloyd's algorithm ends when no vector changes its cluster, at the latest after 25 rounds. The seed is always the
    same.

    Args:
        vectors: float32 (n, dimensions), n at least 1; of length 1, or zero, if `directions`.
        count: maximum number of clusters, at least 1.
        directions: whether to cluster by cosine instead of by Euclidean distance. Then each centre is normalized, but a
            centre of zeros stays zero.
        stop: whether to stop; called before each centre but the first is drawn, and before each 4,000 vectors of a
            round. If stopped, the present centres are returned.

    Returns:
        The centres, float32 (at most count, dimensions): no more centres than distinct vectors.
    """
    generator = np.random.default_rng(_SEED)
    centres = _spread(vectors, count, generator, stop)
    before: Rows | None = None
    for _ in range(_ROUNDS):
        rows = np.zeros(len(vectors), dtype=np.int64)
        for start in range(0, len(vectors), _ASSIGNED_AT_ONCE):
            if stop():
                return centres
            part = slice(start, start + _ASSIGNED_AT_ONCE)
            rows[part], _ = _assigned(vectors[part], centres, directions=directions)
        if before is not None and np.array_equal(rows, before):
            break
        before = rows
        sums = np.zeros_like(centres)
        np.add.at(sums, rows, vectors)
        sizes = np.bincount(rows, minlength=len(centres))
        filled = sizes > 0  # the centre of an empty cluster stays
        centres[filled] = sums[filled] / sizes[filled, None]
        if directions:
            lengths = np.linalg.norm(centres, axis=1, keepdims=True)
            centres = np.divide(centres, lengths, out=centres, where=lengths > 0)
    return centres


def _spread(vectors: Matrix, count: int, generator: np.random.Generator, stop: Callable[[], bool]) -> Matrix:
    """Draw the first centres among the vectors, by k-means++; return float32 (at most count, dimensions).

    The first centre is drawn with equal probabilities. For each further centre a few candidates are drawn, each with a
    probability in proportion to the squared distance from the nearest centre so far. The candidate that makes the sum
    of these squared distances least becomes the centre: with a single candidate, two centres too often fall into one
    cluster. There are fewer than `count` centres if every vector is equal to a centre, or if stopped.
    """
    tries = 2 + int(np.log(count))
    centres = [vectors[int(generator.integers(len(vectors)))]]
    distances = _squared_distances(vectors, centres[0])
    while len(centres) < count and not stop() and (total := distances.sum()) > 0:
        drawn = generator.choice(len(vectors), tries, p=distances / total)
        left = [np.minimum(distances, _squared_distances(vectors, vectors[row])) for row in drawn]
        best = int(np.argmin([each.sum() for each in left]))
        centres.append(vectors[drawn[best]])
        distances = left[best]
    return np.stack(centres)


def _squared_distances(vectors: Matrix, centre: Matrix) -> npt.NDArray[np.float64]:
    difference = vectors - centre
    squares: npt.NDArray[np.float64] = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
    return squares


def _assigned(vectors: Matrix, centres: Matrix, *, directions: bool) -> tuple[Rows, Matrix]:
    """Return for each vector the row of the nearest centre in `centres`, int64 (n,), and the score, float32 (n,).

    The score of vector and centre is the dot product if `directions`, else half of the squared distance, negated. A
    greater score is nearer. Of equally near centres, the first is chosen.
    """
    scores = vectors @ centres.T
    if not directions:
        # The squared distance of vector v and centre c is |v|² - 2 v·c + |c|². To compare centres, |v|² is left out,
        # since it is the same for all centres. Halved and negated, the other terms are v·c - |c|²/2.
        scores -= 0.5 * np.einsum("ij,ij->i", centres, centres)
    rows = np.argmax(scores, axis=1)
    nearest = scores[np.arange(len(rows)), rows]
    if not directions:
        nearest -= 0.5 * np.einsum("ij,ij->i", vectors, vectors)
    return rows, nearest


def _keep_nearest(
    best: Sequence[list[tuple[float, int]]], labels: Labels, rows: Rows, scores: Matrix, maximum: int
) -> None:
    """Merge a batch of records into `best`, in place: keep the `maximum` records of each cluster nearest to its centre.

    Args:
        best: for each cluster score and label of the nearest records so far, best first; of equal scores, the smaller
            label first.
        labels: label of each record of the batch, int64 (n,), ascending.
        rows: cluster of each record of the batch, an index of `best`, int64 (n,).
        scores: score of each record of the batch, float32 (n,); greater is nearer.
        maximum: maximum number of records to keep of a cluster.
    """
    for cluster in np.unique(rows).tolist():
        own = np.flatnonzero(rows == cluster)
        near = own[np.argsort(-scores[own], kind="stable")[:maximum]]
        both = best[cluster] + list(zip(scores[near].tolist(), labels[near].tolist(), strict=True))
        best[cluster][:] = sorted(both, key=lambda each: (-each[0], each[1]))[:maximum]
