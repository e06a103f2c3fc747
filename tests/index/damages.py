"""A collection with one record that is damaged on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.collections.filters import Comparison, Operator
from emberpc.server.index import Collection, Index
from index.support import copy_made, gaussian, make_older

COUNT, WIDTH = 30, 8
LOST = "r00007"
#: Rows around the damaged record. Each lexical search reads every record, so these tests send few queries.
NEAR = slice(5, 10)
EVEN = Comparison("even", Operator.EQUAL, True)
QUERIES = [f"text of r{i:05}" for i in range(COUNT)]
VECTORS = gaussian(COUNT, WIDTH)
TRUTH = {f"r{i:05}": VECTORS[i] for i in range(COUNT)}


def new_records() -> list[NewRecord]:
    return [NewRecord(each, f"text of {each}", {"even": i % 2 == 0}) for i, each in enumerate(TRUTH)]


def _make(folder: Path, distance: Distance) -> None:
    index = Index(folder, buffer_limit=8)
    index.create(CollectionSpec("c", WIDTH, distance=distance)).upsert(new_records(), VECTORS)
    index.close()


@contextmanager
def damaged(
    folder: Path, assignment: str, *parameters: object, distance: Distance = Distance.COSINE, older: int | None = None
) -> Iterator[Collection]:
    """Create a collection, change one of its records in the database file, and open the collection again.

    With `older`, the database has the form of an older version, whose `user_version` is `older`.
    """
    copy_made(folder, _make, distance)
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        if older is not None:
            make_older(connection, older)
        connection.execute(f"UPDATE records SET {assignment} WHERE id = '{LOST}'", parameters)
        connection.commit()
    for graph in folder.rglob("graph-*"):
        graph.unlink()
    with closing(Index(folder, buffer_limit=8)) as index:
        yield index.get("c")


def check_pages(collection: Collection, *, with_vectors: bool) -> None:
    """Check that the pages of a collection have all records but the damaged one, in order."""
    token, found = "", []
    for _ in range(COUNT):
        page, token = collection.page(7, token, with_vectors=with_vectors)
        found += [record.id for record in page]
        if not token:
            break
    assert found == [each for each in TRUTH if each != LOST]
