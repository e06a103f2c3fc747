"""An index agrees with a dict and an exact comparison after any sequence of writes, restarts and maintenance."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.collections.filters import Comparison, Filter, Operator, matches
from emberpc.server.index import Index
from index_helpers import DIMENSIONS, true_scores

kinds = st.integers(0, 3)
conditions = st.builds(
    Comparison, st.sampled_from(["kind", "indexed"]), st.sampled_from([Operator.EQUAL, Operator.LESS]), kinds
)
ids = st.lists(st.sampled_from([f"r{i}" for i in range(40)]), min_size=1, max_size=12, unique=True)


class IndexAgainstDict(RuleBasedStateMachine):
    """The buffer takes only four vectors, so that graphs, deleted nodes and rebuilds are tested, too."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
        self.index = Index(self.folder, buffer_limit=4)
        self.collection = self.index.create(CollectionSpec("c", DIMENSIONS, indexed_fields=("indexed",)))
        self.model: dict[str, np.ndarray] = {}
        self.metadata: dict[str, dict[str, int]] = {}
        self.rng = np.random.default_rng(0)

    @rule(chosen=ids, kind=kinds)
    def upsert(self, chosen: list[str], kind: int) -> None:
        matrix = self.rng.normal(size=(len(chosen), DIMENSIONS)).astype(np.float32)
        metadata = {"kind": kind, "indexed": kind}
        result = self.collection.upsert([NewRecord(each, each, metadata) for each in chosen], matrix)
        assert result.updated == len(set(chosen) & set(self.model))
        assert result.inserted == len(chosen) - result.updated
        self.model.update(zip(chosen, matrix, strict=True))
        self.metadata.update(dict.fromkeys(chosen, metadata))

    @rule(chosen=ids)
    def delete(self, chosen: list[str]) -> None:
        assert self.collection.delete(chosen).deleted == len(set(chosen) & set(self.model))
        for each in chosen:
            self.model.pop(each, None)

    @rule(condition=conditions)
    def delete_matching(self, condition: Filter) -> None:
        gone = self.matching(condition)
        assert self.collection.delete_matching(condition).deleted == len(gone)
        for each in gone:
            del self.model[each]

    def matching(self, condition: Filter | None) -> list[str]:
        return [each for each in self.model if condition is None or matches(condition, self.metadata[each])]

    @rule()
    def maintain(self) -> None:
        self.collection.maintain()

    @rule()
    def restart(self) -> None:
        self.index.close()
        self.index = Index(self.folder, buffer_limit=4)
        self.collection = self.index.get("c")

    @rule(top_k=st.integers(1, 60), condition=st.none() | conditions)
    def search(self, top_k: int, condition: Filter | None) -> None:
        query = self.rng.normal(size=(1, DIMENSIONS)).astype(np.float32)
        names = self.matching(condition)
        assert self.collection.count(condition) == len(names)
        (outcome,) = self.collection.search(query, [top_k], conditions=[condition])
        assert len(outcome.hits) == min(top_k, len(names))
        if not names:
            return
        scores = true_scores(query[0], np.stack([self.model[name] for name in names]), Distance.COSINE)
        expected = np.sort(scores)[::-1][: len(outcome.hits)]
        # With 40 vectors and 128 candidates, a search of the graph reaches every node, so it must be exact.
        assert np.allclose([score for _, score in outcome.hits], expected, atol=1e-4)
        by_name = dict(zip(names, scores, strict=True))
        for record, score in outcome.hits:
            assert abs(by_name[record.id] - score) < 1e-4

    @invariant()
    def holds_the_same(self) -> None:
        assert self.collection.count() == len(self.model)
        assert [record.id for record in self.collection.page(1000, "")[0]] == sorted(self.model)

    def teardown(self) -> None:
        self.index.close()
        shutil.rmtree(self.folder)


IndexAgainstDict.TestCase.settings = settings(
    max_examples=min(settings().max_examples, 100), stateful_step_count=30, deadline=None
)
TestIndexAgainstDict = IndexAgainstDict.TestCase
