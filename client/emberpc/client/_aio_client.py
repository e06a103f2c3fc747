"""The client for asyncio: the calls of `Client`, as coroutines."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any

import grpc.aio
import numpy.typing as npt

from emberpc.client import _checks, _collections, _embedding, _index
from emberpc.client._aio_backup import AsyncBackupCalls
from emberpc.client._aio_groups import AsyncGroupCalls
from emberpc.client._aio_models import AsyncModelCalls
from emberpc.client._aio_running import AsyncRunner
from emberpc.client._calls import Call, Page
from emberpc.client._connection import TLS, Connection
from emberpc.client._embed_stream import EmbedJob
from emberpc.client._upsert_stream import UpsertJob
from emberpc.client.exceptions import AlreadyExists
from emberpc.client.filters import Where
from emberpc.client.types import (
    Classification,
    Collection,
    Distance,
    DType,
    Fusion,
    Hit,
    InputKind,
    Matrix,
    Priority,
    Progress,
    Query,
    Record,
    SearchMode,
    SearchQuery,
    SearchResult,
    StreamedEmbedding,
    StreamItem,
    Truncation,
    UpsertCheckpoint,
    UpsertResult,
)


class AsyncClient(AsyncGroupCalls, AsyncBackupCalls, AsyncModelCalls):
    """A connection to an emberpc server, for asyncio; see `Client` for all that the two have in common.

    The connection is made by the first call, and belongs to the event loop
    that runs it. When that loop is closed, the first call in another one makes
    a new connection; while it is open, a call in another loop raises
    FailedPrecondition. The arguments are those of `Client`, but `channel` is one of
    `grpc.aio`.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float = 30.0,
        tls: TLS | None = None,
        token: str | None = None,
        in_flight: int = 2,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        connection = Connection(target, timeout, tls, token, in_flight, own_channel=channel is not None)
        self._runner = AsyncRunner(connection, channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Do what `Client.close` does."""
        await self._runner.close()

    async def embed(
        self,
        texts: Iterable[str],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        dimensions: int = 0,
        truncation: Truncation = "refuse",
        dtype: DType = "float32",
        normalize: bool | None = None,
        priority: Priority = "interactive",
        batch_size: int = 256,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Matrix:
        """Do what `Client.embed` does."""
        return await self._runner.run(
            _embedding.embed(
                texts,
                model=model,
                input_kind=input_kind,
                dimensions=dimensions,
                truncation=truncation,
                dtype=dtype,
                normalize=normalize,
                priority=priority,
                batch_size=batch_size,
                progress=progress,
            ),
            timeout,
        )

    def embed_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        dimensions: int = 0,
        truncation: Truncation = "refuse",
        dtype: DType = "float32",
        normalize: bool | None = None,
        priority: Priority = "bulk",
        batch_size: int = 64,
        window: int = 1024,
        timeout: float | None = None,
    ) -> AsyncIterator[StreamedEmbedding]:
        """Do what `Client.embed_stream` does; the items may come from an asynchronous iterable too."""
        job = EmbedJob(
            items,
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority,
            batch_size=batch_size,
            window=window,
        )
        return self._runner.stream(job, items, timeout)

    async def count_tokens(
        self,
        texts: Iterable[str],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        batch_size: int = 256,
        timeout: float | None = None,
    ) -> list[int]:
        """Do what `Client.count_tokens` does."""
        job = _embedding.count_tokens(texts, model=model, input_kind=input_kind, batch_size=batch_size)
        return await self._runner.run(job, timeout)

    async def similarity(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        model: str = "",
        source_kind: InputKind = "passage",
        target_kind: InputKind = "passage",
        truncation: Truncation = "refuse",
        timeout: float | None = None,
    ) -> Matrix:
        """Do what `Client.similarity` does."""
        call = _embedding.similarity(
            sources,
            targets,
            model=model,
            source_kind=source_kind,
            target_kind=target_kind,
            truncation=truncation,
        )
        return await self._runner.run_one(call, timeout)

    async def classify(
        self,
        texts: Iterable[str],
        classifier: str = "",
        *,
        top_k: int = 0,
        truncation: Truncation = "refuse",
        priority: Priority = "interactive",
        batch_size: int = 256,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Do what `Client.classify` does."""
        job = _embedding.classify(
            texts,
            classifier,
            top_k=top_k,
            truncation=truncation,
            priority=priority,
            batch_size=batch_size,
            progress=progress,
        )
        return await self._runner.run(job, timeout)

    async def create_collection(
        self,
        name: str,
        *,
        model: str = "",
        dimensions: int = 0,
        distance: Distance = "cosine",
        truncation: Truncation = "refuse",
        m: int = 0,
        ef_construction: int = 0,
        indexed_fields: Iterable[str] = (),
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> Collection:
        """Do what `Client.create_collection` does."""
        call = _collections.create_collection(
            name,
            model=model,
            dimensions=dimensions,
            distance=distance,
            truncation=truncation,
            m=m,
            ef_construction=ef_construction,
            indexed_fields=indexed_fields,
        )
        try:
            return await self._runner.run_one(call, timeout)
        except AlreadyExists as error:
            if not _checks.flag(exist_ok, "exist_ok"):
                raise
            found = await self._runner.run_one(_collections.get_collection(name), timeout)
            return _collections.check_alike(found, call.request, error)

    async def get_collection(self, name: str, *, timeout: float | None = None) -> Collection:
        """Do what `Client.get_collection` does."""
        return await self._runner.run_one(_collections.get_collection(name), timeout)

    def collections(self, *, timeout: float | None = None) -> AsyncIterator[Collection]:
        """Do what `Client.collections` does."""
        return self._runner.pages(_collections.list_collections, timeout)

    async def update_collection(self, name: str, truncation: Truncation, *, timeout: float | None = None) -> Collection:
        """Do what `Client.update_collection` does."""
        return await self._runner.run_one(_collections.update_collection(name, truncation), timeout)

    async def delete_collection(self, name: str, *, timeout: float | None = None) -> None:
        """Do what `Client.delete_collection` does."""
        return await self._runner.run_one(_collections.delete_collection(name), timeout)

    async def upsert(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]],
        *,
        vectors: npt.ArrayLike | None = None,
        truncation: Truncation | None = None,
        expected_revisions: Iterable[int] | None = None,
        batch_size: int = 256,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> UpsertResult:
        """Do what `Client.upsert` does."""
        job = _index.upsert(
            collection,
            records,
            matrix=vectors,
            truncation=truncation,
            expected_revisions=expected_revisions,
            batch_size=batch_size,
            progress=progress,
        )
        return await self._runner.run(job, timeout)

    def upsert_stream(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]] | AsyncIterable[Record | Mapping[str, Any]],
        *,
        truncation: Truncation | None = None,
        batch_size: int = 64,
        window: int = 1024,
        timeout: float | None = None,
    ) -> AsyncIterator[UpsertCheckpoint]:
        """Do what `Client.upsert_stream` does; the records may come from an asynchronous iterable too."""
        job = UpsertJob(records, collection=collection, truncation=truncation, batch_size=batch_size, window=window)
        return self._runner.stream(job, records, timeout)

    async def get(
        self, collection: str, ids: Iterable[str], *, with_vectors: bool = False, timeout: float | None = None
    ) -> list[Record]:
        """Do what `Client.get` does."""
        return await self._runner.run(_index.get(collection, ids, with_vectors=with_vectors), timeout)

    async def delete(
        self,
        collection: str,
        ids: Iterable[str] | None = None,
        *,
        where: Where | None = None,
        timeout: float | None = None,
    ) -> int:
        """Do what `Client.delete` does."""
        return await self._runner.run(_index.delete(collection, ids, where), timeout)

    def records(
        self,
        collection: str,
        *,
        where: Where | None = None,
        with_vectors: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[Record]:
        """Do what `Client.records` does."""

        def page(token: str) -> Call[Any, Page[Record]]:
            return _index.list_records(collection, token, where=where, with_vectors=with_vectors, page_size=page_size)

        return self._runner.pages(page, timeout)

    async def count(self, collection: str, *, where: Where | None = None, timeout: float | None = None) -> int:
        """Do what `Client.count` does."""
        return await self._runner.run_one(_index.count(collection, where), timeout)

    async def search(
        self,
        collection: str,
        query: Query,
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        timeout: float | None = None,
    ) -> list[Hit]:
        """Do what `Client.search` does."""
        job = _index.search(
            collection,
            [query],
            top_k=top_k,
            ef=ef,
            min_recall=min_recall,
            where=where,
            mode=mode,
            dense_weight=dense_weight,
            fusion=fusion,
            truncation=truncation,
            with_vectors=with_vectors,
            name="query",
        )
        return list((await self._runner.run(job, timeout))[0].hits)

    async def search_batch(
        self,
        collection: str,
        queries: Iterable[Query | SearchQuery],
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        timeout: float | None = None,
    ) -> list[SearchResult]:
        """Do what `Client.search_batch` does."""
        return await self._runner.run(
            _index.search(
                collection,
                queries,
                top_k=top_k,
                ef=ef,
                min_recall=min_recall,
                where=where,
                mode=mode,
                dense_weight=dense_weight,
                fusion=fusion,
                truncation=truncation,
                with_vectors=with_vectors,
            ),
            timeout,
        )
