"""The client of an emberpc server; needs grpcio, protobuf and numpy only.

    from emberpc.client import Client

    with Client("localhost:50051") as client:
        vectors = client.embed(["a text", "another"])
        for hit in client.search("docs", "what was that again?"):
            print(hit.score, hit.record.text)

`AsyncClient` has the same methods for asyncio: as coroutines, or with asynchronous iterators
where `Client` returns iterators. `emberpc.client.exceptions` lists the exceptions.
"""

from emberpc.client._aio.client import AsyncClient
from emberpc.client._core.connection import TLS
from emberpc.client._sync.client import Client
from emberpc.client.classification import Classification, Classifier, ClassifierLabel, LabelScore
from emberpc.client.details import ModelVersion, ResponseDetails, Timings, TokenUsage
from emberpc.client.exceptions import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    EmberpcError,
    FailedPrecondition,
    FilterWarning,
    InputError,
    InputTypeError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Violation,
)
from emberpc.client.types import (
    Cluster,
    Collection,
    DuplicatePair,
    FailedRecord,
    Health,
    Hit,
    Model,
    Record,
    RecordId,
    RecordProblem,
    Reembedding,
    SearchPlan,
    SearchQuery,
    SearchResult,
    ServerInfo,
    StreamedEmbedding,
    UpsertCheckpoint,
    UpsertResult,
    Verification,
)

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Classification",
    "Classifier",
    "ClassifierLabel",
    "Client",
    "Cluster",
    "Collection",
    "DataLoss",
    "DeadlineExceeded",
    "DuplicatePair",
    "EmberpcError",
    "FailedPrecondition",
    "FailedRecord",
    "FilterWarning",
    "Health",
    "Hit",
    "InputError",
    "InputTypeError",
    "Internal",
    "InvalidArgument",
    "LabelScore",
    "Model",
    "ModelVersion",
    "NotFound",
    "PermissionDenied",
    "Record",
    "RecordId",
    "RecordProblem",
    "Reembedding",
    "ResourceExhausted",
    "ResponseDetails",
    "SearchPlan",
    "SearchQuery",
    "SearchResult",
    "ServerInfo",
    "StreamedEmbedding",
    "Timings",
    "TokenUsage",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UpsertCheckpoint",
    "UpsertResult",
    "Verification",
    "Violation",
]
