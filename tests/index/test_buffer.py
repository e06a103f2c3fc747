"""The buffer has the contents of a dict after the same operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import Distance
from emberpc.server.collections.types import Matrix
from emberpc.server.index.graph.buffer import Buffer
from index.support import gaussian
from index_helpers import true_scores

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 100)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 300))),
        st.tuples(st.just("take"), st.integers(0, 50)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("chunk", [2**19, 64], ids=["one chunk", "many"])
@given(steps=STEPS, k=st.integers(1, 40))
def test_the_buffer_has_exactly_the_vectors_added_and_not_removed(
    chunk: int, steps: list[tuple[str, int | set[int]]], k: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberpc.server.index.graph.buffer._CHUNK", chunk)
        buffer = Buffer(4, Distance.EUCLIDEAN)
    truth: dict[int, Matrix] = {}
    last = 0
    for action, argument in steps:
        if action == "add" and isinstance(argument, int):
            # Labels have gaps: a failed write uses some up.
            labels = last + 1 + 2 * np.arange(argument, dtype=np.int64)
            vectors = gaussian(argument, 4, seed=last)
            buffer.add(labels, vectors)
            truth.update(zip(labels.tolist(), vectors, strict=True))
            last = max([last, *labels.tolist()])
        elif action == "take" and isinstance(argument, int):
            labels, vectors = buffer.oldest(argument)
            assert labels.tolist() == sorted(truth)[:argument]
            assert all((truth[label] == vector).all() for label, vector in zip(labels.tolist(), vectors, strict=True))
            buffer.remove(set(labels.tolist()))
            truth = {label: vector for label, vector in truth.items() if label not in set(labels.tolist())}
        elif isinstance(argument, set):
            buffer.remove(argument)
            truth = {label: vector for label, vector in truth.items() if label not in argument}
        assert len(buffer) == len(truth)
        assert buffer.labels() == set(truth)
        assert buffer.held([*sorted(truth)[:3], -1]).keys() == set(sorted(truth)[:3])
    found, scores = buffer.search(gaussian(2, 4, seed=1), k)
    assert found.shape == (2, min(k, len(truth)))
    for row, query in enumerate(gaussian(2, 4, seed=1) if truth else ()):
        expected = true_scores(query, np.stack(list(truth.values())), Distance.EUCLIDEAN)
        np.testing.assert_allclose(scores[row], np.sort(expected)[::-1][:k], rtol=1e-5)
        assert set(found[row].tolist()) <= set(truth)
