"""Which records are on a map, with their vectors."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from emberpc.cli.progress import Stages
from emberpc.client import Client
from emberpc.client.types import Record

#: Records of one request.
_PAGE = 500


@dataclass(frozen=True)
class Sample:
    """Records in an order that has nothing to do with what they are; of so many in all."""

    records: tuple[Record, ...]
    total: int


def read_sample(client: Client, collection: str, where: str | None, limit: int, stages: Stages) -> Sample:
    """Read records with their vectors: all, or a sample if there are more than `limit`.

    The sample goes by the ids alone, so it is the same each time, and most of
    it stays when records come and go.

    Args:
        client: asks the server.
        collection: name of the collection.
        where: only records that match this filter.
        limit: most records; 0: all.
        stages: told how far it is.
    """
    total = client.count(collection, where=where)
    stages("reading records", 0, total)
    if limit and total > limit:
        ids = []
        for record in client.records(collection, where=where, page_size=_PAGE):
            ids.append(record.id)
            stages("reading records", len(ids), total)
        total, wanted = len(ids), heapq.nsmallest(limit, ids, key=_rank)
        stages("reading vectors", 0, len(wanted))
        parts = (wanted[i : i + _PAGE] for i in range(0, len(wanted), _PAGE))
        every: Iterable[Record] = chain.from_iterable(client.get(collection, part, with_vectors=True) for part in parts)
        stage, expected = "reading vectors", len(wanted)
    else:
        every = client.records(collection, where=where, with_vectors=True, page_size=_PAGE)
        stage, expected = "reading records", total
    found = []
    for record in every:
        found.append(record)
        stages(stage, len(found), expected)
    # Records may have come since they were counted.
    ranked = sorted(found, key=lambda record: _rank(record.id))[: limit or None]
    return Sample(tuple(ranked), max(total, len(found)))


def _rank(record_id: str) -> bytes:
    """Return where an id stands in an order that is as good as random and always the same."""
    return hashlib.blake2b(record_id.encode(), digest_size=8).digest()
