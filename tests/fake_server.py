"""A fake emberpc server on a real port, for responses and failures that a real server gives only by chance.

It has models with fixed results, records calls, and fails or waits as a test demands.
"""

from __future__ import annotations

# The method of an RPC has the name of the RPC.
# ruff: noqa: N802
import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from emberpc.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    errors_pb2,
    index_pb2,
    index_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    types_pb2,
)
from emberpc.wire import status, vectors
from fake_fault import Fault as Fault  # noqa: PLC0414 - tests import it from here

DIMENSIONS = 8


@dataclass
class Asked:
    """A call that the server received."""

    request: Any
    metadata: dict[str, str | bytes]
    seconds_left: float


def vector_of(text: str) -> np.ndarray:
    """Return the vector of a text: float32 (DIMENSIONS,), of length 1, computed from a hash of the text."""
    values = np.frombuffer(hashlib.sha256(text.encode()).digest()[: DIMENSIONS * 2], dtype="<i2").astype(np.float32)
    unit: np.ndarray = values / np.linalg.norm(values)
    return unit


@dataclass
class FakeServer:
    """The server; a context manager. The keys of `asked` and `faults` are names of RPCs."""

    credentials: grpc.ServerCredentials | None = None
    port: int = 0
    #: More options of gRPC's server.
    options: Sequence[tuple[str, int]] = ()
    #: Fingerprint of the model that streams state.
    fingerprint: str = "one"
    #: Number of messages after which a stream ends, even if more would come.
    stream_ends_after: int | None = None
    #: Whether a stream sends each result twice.
    stream_repeats: bool = False
    #: Set when a stream has ended.
    streams_ended: threading.Event = field(default_factory=threading.Event)
    asked: dict[str, list[Asked]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, deque[Fault | None]] = field(default_factory=lambda: defaultdict(deque))
    #: Warnings in the response of every search, page and count.
    warnings: Sequence[str] = ()
    #: The bytes of every backup.
    backup: bytes = b"a backup"
    #: Called in an RPC before it answers; may wait.
    hooks: dict[str, Callable[[Any], object]] = field(default_factory=dict)
    collections: dict[str, index_pb2.Collection] = field(default_factory=dict)
    records: dict[str, dict[str, index_pb2.Record]] = field(default_factory=lambda: defaultdict(dict))
    vectors: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))

    def __enter__(self) -> FakeServer:
        self._pool = ThreadPoolExecutor(8)
        options = {"grpc.so_reuseport": 0, "grpc.max_receive_message_length": 64 * 2**20, **dict(self.options)}
        self._server = grpc.server(self._pool, options=list(options.items()))
        self.health = HealthServicer()
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(_Embedding(self), self._server)
        classification_pb2_grpc.add_ClassificationServiceServicer_to_server(_Classification(self), self._server)
        index_pb2_grpc.add_IndexServiceServicer_to_server(_Index(self), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self.credentials)
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def begin(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        """Record a call, and fail it if the next fault of its RPC is set."""
        metadata = dict(context.invocation_metadata())
        self.asked[name].append(Asked(request, metadata, context.time_remaining() or 0.0))
        if name in self.hooks:
            self.hooks[name](request)
        if self.faults[name] and (fault := self.faults[name].popleft()):
            fault.end(context)


class _Service:
    def __init__(self, server: FakeServer) -> None:
        self.server = server


class _Embedding(_Service, embedding_pb2_grpc.EmbeddingServiceServicer):
    def Embed(self, request: Any, context: Any) -> Any:
        self.server.begin("Embed", request, context)
        matrix = np.stack([vector_of(text) for text in request.texts])
        if request.dimensions:
            matrix = matrix[:, : request.dimensions]
        model = types_pb2.ModelVersion(name="canned", fingerprint=self.server.fingerprint)
        return embedding_pb2.EmbedResponse(embeddings=vectors.encode(matrix, request.dtype), model=model)

    def EmbedStream(self, requests: Any, context: Any) -> Any:
        """Answer each message with its texts in reverse; the text `bad` fails. Record each message in `asked`."""
        context.add_callback(self.server.streams_ended.set)
        dtype = None
        for number, request in enumerate(requests):
            if number == self.server.stream_ends_after:
                return
            self.server.begin("EmbedStream", request, context)
            response = embedding_pb2.EmbedStreamResponse()
            if dtype is None:
                dtype = request.config.dtype
                response.model.name, response.model.fingerprint = "canned", self.server.fingerprint
            items = list(reversed(request.items))
            good = [item for item in items if item.text != "bad"]
            response.ids.extend(item.id for item in good)
            if good:
                matrix = np.stack([vector_of(item.text) for item in good])
                response.embeddings.CopyFrom(vectors.encode(matrix, dtype))
            for item in items:
                if item.text == "bad":
                    response.failures.add(id=item.id, error=Fault.status_of("text is bad"))
                else:
                    response.usages.add(tokens=len(item.text.split()) + 2)
            yield response
            if self.server.stream_repeats:
                yield response

    def CountTokens(self, request: Any, context: Any) -> Any:
        self.server.begin("CountTokens", request, context)
        return embedding_pb2.CountTokensResponse(token_counts=[len(text.split()) + 2 for text in request.texts])

    def ComputeSimilarity(self, request: Any, context: Any) -> Any:
        self.server.begin("ComputeSimilarity", request, context)
        left = np.stack([vector_of(text) for text in request.sources])
        right = np.stack([vector_of(text) for text in request.targets])
        return embedding_pb2.ComputeSimilarityResponse(
            scores=(left @ right.T).ravel(), rows=len(left), columns=len(right)
        )


class _Classification(_Service, classification_pb2_grpc.ClassificationServiceServicer):
    _CLASSIFIER = classification_pb2.Classifier(
        name="kinds",
        kind=classification_pb2.CLASSIFIER_KIND_FINE_TUNED,
        labels=[
            classification_pb2.Label(name="question", description="asks"),
            classification_pb2.Label(name="statement"),
        ],
        temperature=1.5,
        max_tokens=128,
        rejects=True,
        rejection_threshold=0.25,
        rejection_score=classification_pb2.REJECTION_SCORE_NEAREST_PROTOTYPE,
    )

    def ListClassifiers(self, request: Any, context: Any) -> Any:
        self.server.begin("ListClassifiers", request, context)
        return classification_pb2.ListClassifiersResponse(classifiers=[self._CLASSIFIER])

    def GetClassifier(self, request: Any, context: Any) -> Any:
        self.server.begin("GetClassifier", request, context)
        return classification_pb2.GetClassifierResponse(classifier=self._CLASSIFIER)

    def Classify(self, request: Any, context: Any) -> Any:
        """Classify texts as questions or statements; reject the text `outside`."""
        self.server.begin("Classify", request, context)
        response = classification_pb2.ClassifyResponse()
        for text in request.texts:
            names = ["question", "statement"] if text.endswith("?") else ["statement", "question"]
            item = response.classifications.add(rejected=text == "outside")
            item.rejection_score = 0.125 if item.rejected else 0.75
            item.labels.extend([] if item.rejected else names[:1])
            for name, score in list(zip(names, (0.75, 0.25), strict=True))[: request.top_k or None]:
                item.scores.add(label=name, score=score)
            item.usage.tokens = len(text.split()) + 2
        return response


class _Index(_Service, index_pb2_grpc.IndexServiceServicer):
    def CreateCollection(self, request: Any, context: Any) -> Any:
        self.server.begin("CreateCollection", request, context)
        name = request.collection.name
        if name in self.server.collections:
            Fault(grpc.StatusCode.ALREADY_EXISTS, f"there is a collection {name!r}", "COLLECTION_EXISTS").end(context)
        collection = index_pb2.Collection()
        collection.CopyFrom(request.collection)
        collection.dimensions = collection.dimensions or DIMENSIONS
        collection.create_time.FromNanoseconds(1_700_000_000_500_000_000)
        self.server.collections[name] = collection
        return index_pb2.CreateCollectionResponse(collection=collection)

    def GetCollection(self, request: Any, context: Any) -> Any:
        self.server.begin("GetCollection", request, context)
        return index_pb2.GetCollectionResponse(collection=self._collection(request.name, context))

    def ListCollections(self, request: Any, context: Any) -> Any:
        self.server.begin("ListCollections", request, context)
        names, token = _page(sorted(self.server.collections), request)
        return index_pb2.ListCollectionsResponse(
            collections=[self._collection(name, context) for name in names], next_page_token=token
        )

    def DeleteCollection(self, request: Any, context: Any) -> Any:
        self.server.begin("DeleteCollection", request, context)
        self._collection(request.name, context)
        del self.server.collections[request.name]
        self.server.records.pop(request.name, None)
        return index_pb2.DeleteCollectionResponse()

    def UpsertRecords(self, request: Any, context: Any) -> Any:
        self.server.begin("UpsertRecords", request, context)
        collection = self._collection(request.collection, context)
        stored, rows = self.server.records[request.collection], self.server.vectors[request.collection]
        if request.HasField("vectors"):
            matrix = vectors.decode(request.vectors)
        else:
            matrix = np.stack([vector_of(record.text) for record in request.records])
        new = sum(record.id not in stored for record in request.records)
        collection.sequence += 1
        for record, vector in zip(request.records, matrix, strict=True):
            stored[record.id], rows[record.id] = record, vector
        return index_pb2.UpsertRecordsResponse(
            inserted_count=new,
            updated_count=len(request.records) - new,
            receipt=index_pb2.WriteReceipt(sequence=collection.sequence),
        )

    def BatchGetRecords(self, request: Any, context: Any) -> Any:
        self.server.begin("BatchGetRecords", request, context)
        self._collection(request.collection, context)
        stored = self.server.records[request.collection]
        found = [stored[record_id] for record_id in request.ids if record_id in stored]
        missing = [record_id for record_id in request.ids if record_id not in stored]
        return index_pb2.BatchGetRecordsResponse(
            records=found, vectors=self._vectors(request, found), missing_ids=missing
        )

    def DeleteRecords(self, request: Any, context: Any) -> Any:
        self.server.begin("DeleteRecords", request, context)
        self._collection(request.collection, context)
        stored = self.server.records[request.collection]
        deleted = [stored.pop(record_id) for record_id in request.ids if record_id in stored]
        return index_pb2.DeleteRecordsResponse(deleted_count=len(deleted))

    def ListRecords(self, request: Any, context: Any) -> Any:
        self.server.begin("ListRecords", request, context)
        self._collection(request.collection, context)
        stored = self.server.records[request.collection]
        ids, token = _page(sorted(stored), request)
        found = [stored[record_id] for record_id in ids]
        return index_pb2.ListRecordsResponse(
            records=found,
            vectors=self._vectors(request, found),
            next_page_token=token,
            warnings=self.server.warnings,
        )

    def CountRecords(self, request: Any, context: Any) -> Any:
        self.server.begin("CountRecords", request, context)
        self._collection(request.collection, context)
        return index_pb2.CountRecordsResponse(
            count=len(self.server.records[request.collection]), warnings=self.server.warnings
        )

    def Search(self, request: Any, context: Any) -> Any:
        self.server.begin("Search", request, context)
        self._collection(request.collection, context)
        rows = self.server.vectors[request.collection]
        response = index_pb2.SearchResponse(warnings=self.server.warnings)
        for query in request.queries:
            if query.WhichOneof("query") == "text":
                vector = vector_of(query.text)
            elif query.WhichOneof("query") == "vector":
                vector = vectors.decode(query.vector)[0]
            else:
                vector = rows[query.record_id]
            scores = {key: float(row @ vector) for key, row in rows.items() if key != query.record_id}
            best = sorted(scores, key=lambda key: -scores[key])[: request.top_k or 10]
            found = [self.server.records[request.collection][key] for key in best]
            result = response.results.add(vectors=self._vectors(request, found))
            for record in found:
                result.hits.add(record=record, score=scores[record.id])
            result.plan.strategy = index_pb2.SEARCH_STRATEGY_EXACT
            result.plan.compared_count = len(scores)
            if len(best) < (request.top_k or 10):
                result.plan.shortfall_reason = f"the collection has {len(rows)} records"
        return response

    def BackupCollection(self, request: Any, context: Any) -> Any:
        self.server.begin("BackupCollection", request, context)
        self._collection(request.name, context)
        sha256 = hashlib.sha256(self.server.backup).hexdigest()
        yield index_pb2.BackupCollectionResponse(
            chunk=self.server.backup, total_bytes=len(self.server.backup), sha256=sha256
        )

    def VerifyCollection(self, request: Any, context: Any) -> Any:
        self.server.begin("VerifyCollection", request, context)
        self._collection(request.name, context)
        ids = sorted(self.server.records[request.name])
        info = errors_pb2.ErrorInfo(reason="UNREACHABLE", domain="emberpc")
        response = index_pb2.VerifyCollectionResponse(checked_count=len(ids), total_count=len(ids), done=True)
        for key in filter(lambda key: key.startswith("lost"), ids):
            response.failures.add(id=key, error=status.make(13, f"record {key!r} is out of reach", [info]))
        yield response

    def _collection(self, name: str, context: grpc.ServicerContext) -> index_pb2.Collection:
        if name not in self.server.collections:
            Fault(grpc.StatusCode.NOT_FOUND, f"there is no collection {name!r}", "COLLECTION_NOT_FOUND").end(context)
        collection = self.server.collections[name]
        collection.record_count = len(self.server.records[name])
        return collection

    def _vectors(self, request: Any, found: Sequence[index_pb2.Record]) -> Any:
        if not found or index_pb2.RECORD_PART_VECTOR not in request.parts:
            return None
        rows = self.server.vectors[request.collection]
        return vectors.encode(np.stack([rows[record.id] for record in found]))


class _Models(_Service, model_pb2_grpc.ModelServiceServicer):
    _MODELS = (
        model_pb2.Model(
            name="canned",
            task=model_pb2.MODEL_TASK_EMBEDDING,
            state=model_pb2.MODEL_STATE_READY,
            dimensions=DIMENSIONS,
            max_tokens=256,
            variant="fp32",
            size_bytes=90_000_000,
            quality={"parity.cosine_min": 0.9999998211860657, "ece": 0.01234560000000012},
        ),
        model_pb2.Model(
            name="kinds",
            task=model_pb2.MODEL_TASK_CLASSIFICATION,
            state=model_pb2.MODEL_STATE_READY,
            labels=["question", "statement"],
            max_tokens=128,
            variant="qint8_avx2",
            size_bytes=23_000_000,
        ),
    )

    def ListModels(self, request: Any, context: Any) -> Any:
        self.server.begin("ListModels", request, context)
        return model_pb2.ListModelsResponse(models=self._MODELS)

    def GetModel(self, request: Any, context: Any) -> Any:
        self.server.begin("GetModel", request, context)
        for model in self._MODELS:
            if model.name == request.name:
                return model_pb2.GetModelResponse(model=model)
        Fault(grpc.StatusCode.NOT_FOUND, f"there is no model {request.name!r}", "MODEL_NOT_FOUND").end(context)
        raise AssertionError("unreachable")

    def LoadModel(self, request: Any, context: Any) -> Any:
        self.server.begin("LoadModel", request, context)
        yield from self._steps(request, model_pb2.LoadModelResponse)

    def ReloadModel(self, request: Any, context: Any) -> Any:
        self.server.begin("ReloadModel", request, context)
        yield from self._steps(request, model_pb2.ReloadModelResponse)

    def UnloadModel(self, request: Any, context: Any) -> Any:
        self.server.begin("UnloadModel", request, context)
        return model_pb2.UnloadModelResponse()

    def _steps(self, request: Any, response: Any) -> Any:
        for stage, state in (("warming up", model_pb2.MODEL_STATE_LOADING), ("ready", model_pb2.MODEL_STATE_READY)):
            yield response(model=model_pb2.Model(name=request.name, state=state), stage=stage)


def _page(names: list[str], request: Any) -> tuple[list[str], str]:
    rest = [name for name in names if name > request.page_token]
    size = request.page_size or 3
    return rest[:size], rest[size - 1] if len(rest) > size else ""
