"""Create, get, list, change, verify, reembed and delete collections: build requests, decode responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client._core.enums import DISTANCES, TRUNCATIONS, value_of, word_of
from emberpc.client._core.json_values import to_datetime
from emberpc.client._core.rpc_call import Call, Method, Page, Step
from emberpc.client.exceptions import AlreadyExists
from emberpc.client.types import Collection, Distance, RecordProblem, Reembedding, Truncation, Verification
from emberpc.v1 import index_pb2 as pb
from emberpc.v1.errors_pb2 import ErrorInfo
from emberpc.wire import status

_SERVICE = "/emberpc.v1.IndexService/"
CREATE_COLLECTION = Method(_SERVICE + "CreateCollection", pb.CreateCollectionResponse)
GET_COLLECTION = Method(_SERVICE + "GetCollection", pb.GetCollectionResponse)
LIST_COLLECTIONS = Method(_SERVICE + "ListCollections", pb.ListCollectionsResponse)
UPDATE_COLLECTION = Method(_SERVICE + "UpdateCollection", pb.UpdateCollectionResponse)
DELETE_COLLECTION = Method(_SERVICE + "DeleteCollection", pb.DeleteCollectionResponse)
VERIFY_COLLECTION = Method(_SERVICE + "VerifyCollection", pb.VerifyCollectionResponse)
REEMBED_COLLECTION = Method(_SERVICE + "ReembedCollection", pb.ReembedCollectionResponse)
CANCEL_REEMBEDDING = Method(_SERVICE + "CancelReembedding", pb.CancelReembeddingResponse)


def create_collection(
    name: str,
    *,
    model: str,
    dimensions: int,
    distance: Distance,
    truncation: Truncation,
    m: int,
    ef_construction: int,
    indexed_fields: Iterable[str],
) -> Call[pb.CreateCollectionResponse, Collection]:
    """Return the call of `Client.create_collection`.

    An argument of the wrong type raises InputTypeError. An unknown word, an integer outside int32 or below 0, or a text
    with a lone surrogate raises InputError. The server checks names and limits.
    """
    fields = checks.texts(indexed_fields, "indexed_fields", minimum=0)
    collection = pb.Collection(
        name=checks.text(name, "name"),
        model=checks.text(model, "model"),
        dimensions=checks.count(dimensions, "dimensions"),
        distance=value_of("distance", distance, DISTANCES),
        truncation=value_of("truncation", truncation, TRUNCATIONS),
        hnsw=pb.HnswParameters(
            m=checks.count(m, "m"), ef_construction=checks.count(ef_construction, "ef_construction")
        ),
        indexed_fields=fields,
    )
    request = pb.CreateCollectionRequest(collection=collection)
    return Call(CREATE_COLLECTION, request, lambda response: read_collection(response.collection))


def check_alike(found: Collection, request: Message, error: AlreadyExists) -> Collection:
    """Return the existing collection if it has the settings that `create_collection(exist_ok=True)` asked for.

    The compared settings are the model and the distance, and those of `dimensions`, `m` and `ef_construction` that are
    not 0 in the request. Truncation and indexed fields may differ.

    Args:
        found: the existing collection.
        request: the CreateCollectionRequest that failed.
        error: the server's error for `request`, which becomes the cause of the raised error.

    Raises:
        AlreadyExists: a setting differs. The message names the first that differs.
    """
    wanted = cast(pb.CreateCollectionRequest, request).collection
    asked = {
        "model": wanted.model,
        "distance": word_of(wanted.distance, DISTANCES),
        "dimensions": wanted.dimensions or found.dimensions,
        "m": wanted.hnsw.m or found.m,
        "ef_construction": wanted.hnsw.ef_construction or found.ef_construction,
    }
    for name, value in asked.items():
        if (present := getattr(found, name)) != value:
            raise AlreadyExists(
                f"there is a collection {found.name!r} already, and its {name} is {present!r}, not {value!r}; choose "
                "another name, or delete it first",
                reason=error.reason,
                metadata=error.metadata,
                request_id=error.request_id,
            ) from error
    return found


def get_collection(name: str) -> Call[pb.GetCollectionResponse, Collection]:
    """Return the call of `Client.get_collection`; `checks.text` validates the name."""
    request = pb.GetCollectionRequest(name=checks.text(name, "name"))
    return Call(GET_COLLECTION, request, lambda response: read_collection(response.collection))


def list_collections(page_token: str, page_size: int) -> Call[pb.ListCollectionsResponse, Page[Collection]]:
    """Return the call for one page of `Client.collections`; the token of the first page is empty.

    A `page_size` that is not an int raises InputTypeError; one outside int32 or below 0 raises InputError.
    """
    return Call(
        LIST_COLLECTIONS,
        pb.ListCollectionsRequest(page_token=page_token, page_size=checks.count(page_size, "page_size")),
        lambda response: Page([read_collection(message) for message in response.collections], response.next_page_token),
    )


def update_collection(name: str, truncation: Truncation) -> Call[pb.UpdateCollectionResponse, Collection]:
    """Return the call of `Client.update_collection`, which changes only the truncation.

    A wrong type raises InputTypeError; an unknown truncation, or a name with a lone surrogate, raises InputError.
    """
    request = pb.UpdateCollectionRequest(
        collection=pb.Collection(
            name=checks.text(name, "name"), truncation=value_of("truncation", truncation, TRUNCATIONS)
        ),
        update_mask=FieldMask(paths=["truncation"]),
    )
    return Call(UPDATE_COLLECTION, request, lambda response: read_collection(response.collection))


def delete_collection(name: str) -> Call[pb.DeleteCollectionResponse, None]:
    """Return the call of `Client.delete_collection`; `checks.text` validates the name."""
    request = pb.DeleteCollectionRequest(name=checks.text(name, "name"))
    return Call(DELETE_COLLECTION, request, lambda _: None)


def reembed(name: str, model: str, dimensions: int) -> Call[pb.ReembedCollectionResponse, Collection]:
    """Return the call of `Client.reembed_collection`.

    A wrong type raises InputTypeError. `dimensions` outside int32 or below 0, or a text with a lone surrogate, raises
    InputError. The server checks the rest.
    """
    request = pb.ReembedCollectionRequest(
        name=checks.text(name, "name"),
        model=checks.text(model, "model"),
        dimensions=checks.count(dimensions, "dimensions"),
    )
    return Call(REEMBED_COLLECTION, request, lambda response: read_collection(response.collection))


def cancel_reembedding(name: str) -> Call[pb.CancelReembeddingResponse, Collection]:
    """Return the call of `Client.cancel_reembedding`; `checks.text` validates the name."""
    request = pb.CancelReembeddingRequest(name=checks.text(name, "name"))
    return Call(CANCEL_REEMBEDDING, request, lambda response: read_collection(response.collection))


def verify_collection(
    name: str, progress: Callable[[int, int], None] | None, full: bool
) -> Call[pb.VerifyCollectionResponse, Step[Verification]]:
    """Return the call of `Client.verify_collection`, which yields a step for each response.

    Each step has the problems of all responses so far, so the call can be run once only. Decoding a response also calls
    `progress`, unless it is None, with the numbers of checked records and of all records.
    A `name`, `full` or `progress` of the wrong type raises InputTypeError, a name with a lone surrogate InputError.
    """
    checks.function(progress, "progress")
    problems: list[RecordProblem] = []

    def read(message: pb.VerifyCollectionResponse) -> Step[Verification]:
        for failure in message.failures:
            info = status.detail(failure.error, ErrorInfo)
            problems.append(RecordProblem(failure.id, info.reason if info else "", failure.error.message))
        if progress is not None:
            progress(message.checked_count, message.total_count)
        return Step("done" if message.done else "checking", Verification(message.checked_count, tuple(problems)))

    request = pb.VerifyCollectionRequest(name=checks.text(name, "name"), full=checks.flag(full, "full"))
    return Call(VERIFY_COLLECTION, request, read)


def read_collection(message: pb.Collection) -> Collection:
    """Convert a collection in a response, a protobuf message, to the client's type `Collection`."""
    return Collection(
        name=message.name,
        model=message.model,
        model_fingerprint=message.model_fingerprint,
        dimensions=message.dimensions,
        distance=word_of(message.distance, DISTANCES),
        truncation=word_of(message.truncation, TRUNCATIONS),
        m=message.hnsw.m,
        ef_construction=message.hnsw.ef_construction,
        record_count=message.record_count,
        sequence=message.sequence,
        size_bytes=message.size_bytes,
        create_time=to_datetime(message.create_time) if message.HasField("create_time") else None,
        problem=message.problem,
        reembedding=_reembedding(message.reembedding) if message.HasField("reembedding") else None,
        indexed_fields=tuple(message.indexed_fields),
    )


def _reembedding(message: pb.Reembedding) -> Reembedding:
    return Reembedding(
        model=message.model,
        done=message.done,
        total=message.total,
        start_time=to_datetime(message.start_time) if message.HasField("start_time") else None,
        problem=message.problem,
    )
