"""Build hostile requests for tests and a benchmark: expensive ones, and some that the server must refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message

from emberpc.v1 import (
    classification_pb2,
    embedding_pb2,
    filter_pb2,
    index_pb2,
    model_pb2,
    server_pb2,
    types_pb2,
)
from emberpc.wire import vectors

#: Names of the collections of `preparation`. `TEXTS` has the model `tiny`; the other two have no model. The requests
#: that upsert records with much metadata use `METADATA`.
TEXTS, POINTS, METADATA = "hostile-texts", "hostile-points", "hostile-metadata"
_INDEX, _EMBEDDING = "/emberpc.v1.IndexService/", "/emberpc.v1.EmbeddingService/"

#: The character or characters that are repeated to make a long text, by the name of the kind of text.
KINDS = {
    "one letter": "a",
    "words": "word ",
    "punctuation": "!",
    "combining marks": "e\u0301\u0327",
    "only marks": "\u0301\u0327",
    "emoji": "\U0001f469\u200d\U0001f680",
    "unsegmented": "漢字",
    "line ends": "x\r\n",
    "right to left": "\u202eا\u202c",
    "long tokens": "1234567890abcdef",
}


@dataclass(frozen=True)
class Hostile:
    """A request that may harm a server.

    Attributes:
        method: path of the RPC.
        messages: the messages of the stream of requests, or a list of one message. Bytes are sent as they are; they may
            be no valid message.
        streams: whether the RPC has a stream of requests, and whether it has a stream of responses.
        refused: whether the server must refuse the request. If not, it may answer or refuse.
    """

    method: str
    messages: list[Message | bytes]
    streams: tuple[bool, bool] = (False, False)
    refused: bool = False

    @property
    def data(self) -> list[bytes]:
        """The bytes to send for each message."""
        return [each if isinstance(each, bytes) else each.SerializeToString() for each in self.messages]


@dataclass(frozen=True)
class Size:
    """Sizes of the hostile requests.

    Attributes:
        text: maximum number of bytes of a long text.
        message: approximate bytes of a request with too many elements.
        records: number of records with much metadata in one request.
        numbers: maximum count of numbers in the metadata of each of these records. With the defaults, the request is
            near the server's limit of elements.
        dimensions: dimensions of the vectors of the model and of the collections.
    """

    text: int = 2**20
    message: int = 15 * 2**20
    records: int = 100
    numbers: int = 4000
    dimensions: int = 32


SHORT = Size(text=100_000, message=2**20, records=10)


def _record(record_id: str, text: str, metadata: dict[str, Any]) -> index_pb2.Record:
    record = index_pb2.Record(id=record_id, text=text)
    record.metadata.update(metadata)
    return record


def text_of(kind: str, size: int) -> str:
    """Return a text of at most `size` bytes in UTF-8 that repeats the characters of `KINDS[kind]`."""
    unit = KINDS[kind]
    return unit * (size // len(unit.encode()))


def preparation(size: Size) -> Iterator[tuple[str, Message]]:
    """Yield the path of the RPC and the message of requests that create three collections of 1,000 records each.

    The requests must be sent in this order, before the hostile requests.
    """
    for name, model in ((TEXTS, "tiny"), (POINTS, ""), (METADATA, "")):
        collection = index_pb2.Collection(name=name, model=model, dimensions=size.dimensions)
        yield _INDEX + "CreateCollection", index_pb2.CreateCollectionRequest(collection=collection)
        matrix = np.random.default_rng(0).standard_normal((1000, size.dimensions)).astype(np.float32)
        records = [
            _record(f"r{i:04}", f"the record {i}", {"n": i, "tags": ["a", "b"], "s": f"t{i}"}) for i in range(1000)
        ]
        request = index_pb2.UpsertRecordsRequest(collection=name, records=records, vectors=vectors.encode(matrix))
        yield _INDEX + "UpsertRecords", request


def requests(size: Size) -> dict[str, Hostile]:
    """Return all hostile requests by name.

    The server must have the collections of `preparation(size)`, and an embedding model `tiny` with `size.dimensions`
    dimensions. Some requests change the collections. The requests that read much metadata follow those that write it.
    """
    found: dict[str, Hostile] = {}
    for kind in KINDS:
        text = text_of(kind, size.text)
        for name, hostile in _of_text(text).items():
            found[f"{name}: {kind}"] = hostile
    return {**found, **_of_filters(), **_of_counts(size), **_of_answers(size), **_of_others(size)}


def _of_text(text: str) -> dict[str, Hostile]:
    """Return requests with a long text, by name: calls of Embed, CountTokens, Search and EmbedStream."""
    search = _INDEX + "Search"
    query = index_pb2.SearchQuery(text=text)
    embed = embedding_pb2.EmbedRequest(model="tiny", texts=[text])
    found = {}
    for name, truncation in (("end", types_pb2.TRUNCATION_END), ("start", types_pb2.TRUNCATION_START)):
        request = embedding_pb2.EmbedRequest(truncation=truncation)
        request.MergeFrom(embed)
        found[f"embed, cut at the {name}"] = Hostile(_EMBEDDING + "Embed", [request])
    found["count tokens"] = Hostile(
        _EMBEDDING + "CountTokens", [embedding_pb2.CountTokensRequest(model="tiny", texts=[text] * 4)]
    )
    for mode in ("DENSE", "LEXICAL", "HYBRID"):
        request_ = index_pb2.SearchRequest(
            collection=TEXTS, queries=[query], mode=index_pb2.SearchMode.Value(f"SEARCH_MODE_{mode}")
        )
        found[f"search {mode}"] = Hostile(search, [request_])
    item = embedding_pb2.EmbedStreamItem(id="a", text=text)
    found["embed stream"] = Hostile(
        _EMBEDDING + "EmbedStream",
        [embedding_pb2.EmbedStreamRequest(config=embedding_pb2.EmbedStreamConfig(model="tiny"), items=[item])],
        (True, True),
    )
    return found


def _count(condition: filter_pb2.Filter, *, refused: bool = False) -> Hostile:
    request = index_pb2.CountRecordsRequest(collection=TEXTS, filter=condition)
    return Hostile(_INDEX + "CountRecords", [request], refused=refused)


def _all(conditions: list[filter_pb2.Filter]) -> filter_pb2.Filter:
    return filter_pb2.Filter(all=filter_pb2.FilterList(filters=conditions))


def _any(conditions: list[filter_pb2.Filter]) -> filter_pb2.Filter:
    return filter_pb2.Filter(any=filter_pb2.FilterList(filters=conditions))


def _prefix(prefix: str, name: str = "s") -> filter_pb2.Filter:
    return filter_pb2.Filter(prefix=filter_pb2.Prefix(field=name, prefix=prefix))


def _not(condition: filter_pb2.Filter, times: int) -> filter_pb2.Filter:
    for _ in range(times):
        outer = filter_pb2.Filter()
        getattr(outer, "not").CopyFrom(condition)
        condition = outer
    return condition


def _of_filters() -> dict[str, Hostile]:
    """Return requests with deep, wide or otherwise large filters by name; some exceed a limit of the server."""
    wide = _any([_any([_prefix(f"t{i}{j}") for j in range(80)]) for i in range(3)])
    odd = ".".join(['"'] * 40)
    values = [filter_pb2.FilterValue(string_value=f"v{i}") for i in range(10_000)]
    member = filter_pb2.Filter(membership=filter_pb2.Membership(field="s", values=values))
    queries = [index_pb2.SearchQuery(record_id=f"r{i:04}", filter=wide) for i in range(8)]
    deep = _not(_prefix("t"), 31)
    return {
        "a wide filter": _count(wide),
        "a deep filter": _count(deep),
        "a filter of many keys": _count(_all([_prefix("x", odd)] * 90)),
        "a filter that is too deep": _count(_not(deep, 1), refused=True),
        "a filter of too many keys": _count(_prefix("x", ".".join("k" * 400)), refused=True),
        "memberships": _count(_any([member] * 5)),
        "too many memberships": _count(_any([member] * 6), refused=True),
        "a filter for each query": Hostile(
            _INDEX + "Search", [index_pb2.SearchRequest(collection=TEXTS, queries=queries)]
        ),
        "a filtered deletion": Hostile(
            _INDEX + "DeleteRecords", [index_pb2.DeleteRecordsRequest(collection=POINTS, filter=_all([wide, deep]))]
        ),
        "a filtered list": Hostile(
            _INDEX + "ListRecords", [index_pb2.ListRecordsRequest(collection=TEXTS, filter=wide, page_size=1000)]
        ),
    }


#: Requests that repeat an element inside nested messages too many times. Each has a name, the path of the RPC, the
#: numbers of the fields that contain the elements (outermost first), and one element in protobuf's wire format.
_NESTED = (
    ("empty conditions", _INDEX + "CountRecords", (2, 1), b"\x0a\x00"),
    ("empty values of a membership", _INDEX + "CountRecords", (2, 5), b"\x12\x00"),
    ("empty conditions of a query", _INDEX + "Search", (2, 4, 1), b"\x0a\x00"),
    ("empty indexed fields", _INDEX + "CreateCollection", (1,), b"\x42\x00"),
    ("empty paths of a mask", _INDEX + "UpdateCollection", (2,), b"\x0a\x00"),
    ("packed revisions", _INDEX + "UpsertRecords", (4,), b"\x01"),
    ("empty metadata fields", _INDEX + "UpsertRecords", (2, 3), b"\x0a\x00"),
    ("empty metadata values", _INDEX + "UpsertRecords", (2, 3, 1, 2, 6), b"\x0a\x00"),
    ("unknown fields of a record", _INDEX + "UpsertRecords", (2,), b"\xf8\x07\x01"),
)


def _within(numbers: Sequence[int], data: bytes) -> bytes:
    """Wrap bytes in nested length-delimited fields, and return the result in protobuf's wire format.

    Args:
        numbers: numbers of the fields, the outermost first; each below 16, so that its tag has one byte.
        data: content of the innermost field.
    """
    for number in reversed(numbers):
        length = bytearray()
        size = len(data)
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        data = bytes([number << 3 | 2, *length, size]) + data
    return data


def _of_counts(size: Size) -> dict[str, Hostile]:
    """Return requests that the server must refuse, by name: too many small elements, or bytes that are no message."""
    record = index_pb2.UpsertRecordsRequest(records=[index_pb2.Record()]).SerializeToString()
    cases = {
        "empty texts": (_EMBEDDING + "Embed", embedding_pb2.EmbedRequest(texts=[""]).SerializeToString()),
        "empty sources": (
            _EMBEDDING + "ComputeSimilarity",
            embedding_pb2.ComputeSimilarityRequest(sources=[""]).SerializeToString(),
        ),
        "texts to classify": (
            "/emberpc.v1.ClassificationService/Classify",
            classification_pb2.ClassifyRequest(texts=[""]).SerializeToString(),
        ),
        "empty records": (_INDEX + "UpsertRecords", record),
        "empty ids": (_INDEX + "BatchGetRecords", index_pb2.BatchGetRecordsRequest(ids=[""]).SerializeToString()),
        "ids to delete": (_INDEX + "DeleteRecords", index_pb2.DeleteRecordsRequest(ids=[""]).SerializeToString()),
        "empty queries": (
            _INDEX + "Search",
            index_pb2.SearchRequest(queries=[index_pb2.SearchQuery()]).SerializeToString(),
        ),
        "unknown fields": (_INDEX + "GetCollection", b"\xf8\x07\x01"),
        "no protobuf": ("/emberpc.v1.ModelService/ListModels", b"\xff"),
    }
    found = {
        name: Hostile(method, [one * (size.message // len(one))], refused=True) for name, (method, one) in cases.items()
    }
    for name, method, within, one in _NESTED:
        found[name] = Hostile(method, [_within(within, one * (size.message // len(one)))], refused=True)
    # This request begins with a group, a deprecated kind of field. When the server counts elements, it must skip the
    # group and count the elements after it.
    found["a group"] = Hostile(
        _INDEX + "UpsertRecords", [b"\xf3\x07\xf4\x07" + record * (size.message // len(record))], refused=True
    )
    stream = index_pb2.UpsertRecordsStreamRequest(records=[index_pb2.Record()]).SerializeToString()
    found["empty records in a stream"] = Hostile(
        _INDEX + "UpsertRecordsStream", [stream * (size.message // len(stream))], (True, True), refused=True
    )
    return found


def _of_answers(size: Size) -> dict[str, Hostile]:
    """Return requests that the server may answer, by name: large ones, with large responses, or with much work."""
    documents: dict[str, dict[str, Any]] = {
        "lists of numbers": {"n": [float(i) for i in range(size.numbers)]},
        "wide objects": {f"k{i}": i for i in range(7 * size.numbers // 8)},
        "lists of objects": {"a": [{"k": i} for i in range(3 * size.numbers // 7)]},
    }
    ids = [f"m{i}" for i in range(size.records)]
    matrix = vectors.encode(np.ones((size.records, size.dimensions), dtype=np.float32))
    some = [f"r{i:04}" for i in range(1000)]
    queries = [index_pb2.SearchQuery(record_id=each) for each in some]
    return {
        **{
            f"metadata: {name}": Hostile(
                _INDEX + "UpsertRecords",
                [
                    index_pb2.UpsertRecordsRequest(
                        collection=METADATA, records=[_record(each, "", document) for each in ids], vectors=matrix
                    )
                ],
            )
            for name, document in documents.items()
        },
        "a page of metadata": Hostile(
            _INDEX + "ListRecords", [index_pb2.ListRecordsRequest(collection=METADATA, page_size=1000)]
        ),
        "records with metadata": Hostile(
            _INDEX + "BatchGetRecords", [index_pb2.BatchGetRecordsRequest(collection=METADATA, ids=ids)]
        ),
        "a page of all": Hostile(
            _INDEX + "ListRecords",
            [index_pb2.ListRecordsRequest(collection=POINTS, page_size=1000, parts=[1, 2, 3])],  # type: ignore[list-item]
        ),
        "ids many times": Hostile(
            _INDEX + "BatchGetRecords", [index_pb2.BatchGetRecordsRequest(collection=TEXTS, ids=some * 10)]
        ),
        "many queries": Hostile(
            _INDEX + "Search", [index_pb2.SearchRequest(collection=TEXTS, queries=queries, top_k=100)]
        ),
        "many hits": Hostile(
            _INDEX + "Search", [index_pb2.SearchRequest(collection=TEXTS, queries=queries[:10], top_k=10_000)]
        ),
        "exact searches": Hostile(
            _INDEX + "Search", [index_pb2.SearchRequest(collection=TEXTS, queries=queries, top_k=1, min_recall=1)]
        ),
        "many clusters": Hostile(
            _INDEX + "ClusterRecords",
            [index_pb2.ClusterRecordsRequest(collection=TEXTS, cluster_count=1000, examples_per_cluster=100)],
        ),
        "all pairs": Hostile(
            _INDEX + "FindDuplicates",
            [index_pb2.FindDuplicatesRequest(collection=TEXTS, min_score=0.01, page_size=1000)],
        ),
        "a similarity of many": Hostile(
            _EMBEDDING + "ComputeSimilarity",
            [embedding_pb2.ComputeSimilarityRequest(model="tiny", sources=["a"] * 2048, targets=["b"] * 2048)],
        ),
        "many texts": Hostile(_EMBEDDING + "Embed", [embedding_pb2.EmbedRequest(model="tiny", texts=["a b c"] * 4096)]),
    }


def _of_others(size: Size) -> dict[str, Hostile]:
    """Return the remaining requests by name: with invalid, overlong or missing values, and calls of further RPCs."""
    forged = "WzFlOTk5LCAiYSIsICJiIl0="
    collection = index_pb2.Collection(name="x" * 10_000, dimensions=2**31 - 1)
    info = server_pb2.GetServerInfoRequest()
    return {
        "a forged page": Hostile(
            _INDEX + "FindDuplicates",
            [index_pb2.FindDuplicatesRequest(collection=TEXTS, page_token=forged)],
            refused=True,
        ),
        "a long page token": Hostile(
            _INDEX + "ListCollections", [index_pb2.ListCollectionsRequest(page_token="x" * 10**6)], refused=True
        ),
        "a collection out of bounds": Hostile(
            _INDEX + "CreateCollection", [index_pb2.CreateCollectionRequest(collection=collection)], refused=True
        ),
        "a verification": Hostile(
            _INDEX + "VerifyCollection", [index_pb2.VerifyCollectionRequest(name=TEXTS, full=True)], (False, True)
        ),
        "a backup": Hostile(
            _INDEX + "BackupCollection", [index_pb2.BackupCollectionRequest(name=TEXTS)], (False, True)
        ),
        "a restore of zeros": Hostile(
            _INDEX + "RestoreCollection",
            [
                index_pb2.RestoreCollectionRequest(name="restored", chunk=bytes(size.message // 4)),
                index_pb2.RestoreCollectionRequest(chunk=bytes(size.message // 4), sha256="0" * 64),
            ],
            (True, False),
            refused=True,
        ),
        "a re-embedding to no model": Hostile(
            _INDEX + "ReembedCollection",
            [index_pb2.ReembedCollectionRequest(name=TEXTS, model="x" * 10**5)],
            refused=True,
        ),
        "a cancellation": Hostile(_INDEX + "CancelReembedding", [index_pb2.CancelReembeddingRequest(name=TEXTS)]),
        "an update of nothing": Hostile(
            _INDEX + "UpdateCollection",
            [index_pb2.UpdateCollectionRequest(collection=index_pb2.Collection(name=TEXTS))],
            refused=True,
        ),
        "a description": Hostile(_INDEX + "GetCollection", [index_pb2.GetCollectionRequest(name=TEXTS)]),
        "a deletion of none": Hostile(
            _INDEX + "DeleteCollection", [index_pb2.DeleteCollectionRequest(name="x" * 10**5)], refused=True
        ),
        "a model from elsewhere": Hostile(
            "/emberpc.v1.ModelService/LoadModel",
            [model_pb2.LoadModelRequest(name="m", path="../" * 10**5)],
            (False, True),
            refused=True,
        ),
        "a model that is not there": Hostile(
            "/emberpc.v1.ModelService/GetModel", [model_pb2.GetModelRequest(name="x" * 10**6)], refused=True
        ),
        "the limits": Hostile("/emberpc.v1.ServerService/GetServerInfo", [info]),
    }
