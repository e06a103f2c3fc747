"""A response that is joined from cached bytes equals the one that messages give."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import Cluster, Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services import record_responses
from emberpc.server.services.index_messages import RequestedParts, record_vectors
from emberpc.server.services.record_bytes import struct_bytes
from emberpc.server.services.search_response import response_bytes
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2

LIMITS = Limits(1000, 2**20, 2**20, 2**25, 2**20)
NUMBERS = st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
METADATA = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(timezone.utc))
RECORDS = st.builds(
    StoredRecord,
    id=st.text(min_size=1),
    # Texts whose length takes one, two or three bytes.
    text=st.text() | st.sampled_from(["x" * 200, "ä" * 20_000]),
    metadata_text=METADATA.map(json.dumps),
    label=st.text(),
    revision=st.integers(0, 2**62),
    create_time=MOMENTS,
    update_time=MOMENTS,
    vector=st.just(np.array([1, 2], dtype=np.float32)),
    expire_time=st.none(),
)
SCORES = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0])
PLANS = st.builds(
    Plan,
    st.sampled_from(SearchStrategy),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**62),
    st.text(),
    st.integers(0, 2**31),
)
OUTCOMES = st.builds(SearchOutcome, st.lists(st.tuples(RECORDS, SCORES), max_size=4), PLANS)
USAGES = st.none() | st.builds(types_pb2.TokenUsage, tokens=st.integers(0, 2**31 - 1), truncated=st.booleans())


def fill_record(message: pb.Record, record: StoredRecord, parts: RequestedParts) -> None:
    message.id, message.label, message.revision = record.id, record.label, record.revision
    message.create_time.FromDatetime(record.create_time)
    message.update_time.FromDatetime(record.update_time)
    if parts.text:
        message.text = record.text
    if parts.metadata and record.metadata:
        message.metadata.update(record.metadata)


def message_of(
    outcomes: list[SearchOutcome],
    parts: RequestedParts,
    rest: pb.SearchResponse,
    usages: list[types_pb2.TokenUsage | None],
) -> pb.SearchResponse:
    response = pb.SearchResponse()
    for i, outcome in enumerate(outcomes):
        result = response.results.add(
            plan=pb.SearchPlan(
                strategy=pb.SearchStrategy.Value(f"SEARCH_STRATEGY_{outcome.plan.strategy.name}"),
                ef=outcome.plan.ef,
                compared_count=outcome.plan.compared_count,
                shortfall_reason=outcome.plan.shortfall_reason,
                lexical_count=outcome.plan.lexical_count,
            ),
            vectors=record_vectors([record for record, _ in outcome.hits], parts),
            usage=usages[i] if usages else None,
        )
        for record, score in outcome.hits:
            fill_record(result.hits.add(score=score).record, record, parts)
    response.MergeFrom(rest)
    return response


@given(data=st.data(), outcomes=st.lists(OUTCOMES, max_size=3), lookup_seconds=st.floats(0, 10))
def test_search_responses_joined_from_bytes_equal_the_messages(
    data: st.DataObject, outcomes: list[SearchOutcome], lookup_seconds: float
) -> None:
    rest = pb.SearchResponse(timings=types_pb2.Timings(lookup_seconds=lookup_seconds))
    count = len(outcomes)
    usages = data.draw(st.just([]) | st.lists(USAGES, min_size=count, max_size=count))
    wanted = st.lists(st.sampled_from([pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA, pb.RECORD_PART_VECTOR]))
    # The same records are serialized repeatedly: bytes cached for one request must not appear in another response.
    for asked in data.draw(st.lists(wanted, min_size=1, max_size=4)):
        parts = RequestedParts.of(asked)
        written = response_bytes(outcomes, parts, rest, usages)
        assert pb.SearchResponse.FromString(written) == message_of(outcomes, parts, rest, usages)


@given(METADATA)
def test_metadata_is_serialized_as_a_struct(metadata: dict[str, Any]) -> None:
    message = Struct()
    message.update(metadata)
    assert Struct.FromString(struct_bytes(metadata)) == message


@given(st.lists(RECORDS, max_size=4, unique_by=lambda record: record.id), st.data())
def test_responses_of_pages_gets_and_clusters_have_the_records(
    records: list[StoredRecord], data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.sampled_from([pb.RECORD_PART_METADATA, pb.RECORD_PART_VECTOR])))
    parts = RequestedParts.of(asked)
    messages = [pb.Record() for _ in records]
    for message, record in zip(messages, records, strict=True):
        fill_record(message, record, parts)
    ids = [record.id for record in records]
    collection: Any = Mock(get=Mock(return_value=records), page=Mock(return_value=(records, "next")))
    collection.spec.dimensions = 2
    vectors = record_vectors(records, parts)
    found = record_responses.batch_get(collection, [*ids, ""], parts, LIMITS)
    whole = pb.BatchGetRecordsResponse(records=messages, vectors=vectors, missing_ids=[""])
    assert pb.BatchGetRecordsResponse.FromString(found) == whole
    page = record_responses.page(collection, 10, "", None, parts, LIMITS)
    listed = pb.ListRecordsResponse(records=messages, vectors=vectors, next_page_token="next")
    assert pb.ListRecordsResponse.FromString(page) == listed
    if parts.text and parts.metadata:
        clusters = [Cluster(10**6, records), Cluster(0, [])]
        wanted = [pb.Cluster(record_count=10**6, examples=messages), pb.Cluster()]
        serialized = record_responses.clusters(clusters, LIMITS)
        assert pb.ClusterRecordsResponse.FromString(serialized) == pb.ClusterRecordsResponse(clusters=wanted)


def record(**fields: Any) -> StoredRecord:
    now = datetime.now(timezone.utc)
    return StoredRecord("a", "text", "{}", "", 1, now, now, **fields)


@pytest.mark.parametrize(("stays", "kept"), [(True, 1), (False, 0)])
def test_a_record_with_a_time_to_live_is_serialized_each_time(stays: bool, kept: int) -> None:
    """The remaining time to live of a record counts from the moment of the response."""
    expires = None if stays else datetime.now(timezone.utc) + timedelta(seconds=100)
    found = record(expire_time=expires)
    outcome = SearchOutcome([(found, 0.5)], Plan(SearchStrategy.EXACT, 0, 1))
    written = response_bytes([outcome], RequestedParts.of([]), pb.SearchResponse())
    (hit,) = pb.SearchResponse.FromString(written).results[0].hits
    assert hit.record.HasField("time_to_live") is not stays
    assert len(found.serialized) == kept
