"""Backup and restore with the clients and the command line; callers that leave, stall or send invalid messages."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from aio_server import FIXED_WINDOWS, channel_to
from emberpc.cli.main import main
from emberpc.client import AlreadyExists, AsyncClient, Client, InputError, InvalidArgument, NotFound
from emberpc.server.collections import CollectionBackend, CollectionSpec, NewRecord
from emberpc.server.handlers import Handlers, Observe
from emberpc.server.index import Index
from emberpc.server.pipelines.backups import CollectionBackups
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.services import requests
from emberpc.server.services.backups import backup_responses
from emberpc.server.services.backups import restore as restore_from
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from examples.server_process import ServerProcess
from waiting import wait_until

COUNT, DIMENSIONS = 1000, 500


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def address(data_dir: Path) -> Iterator[str]:
    """A server without models, with a collection `points` of 2 MB."""
    with ServerProcess({}, data_dir) as process:
        with Client(process.address) as client:
            client.create_collection("points", dimensions=DIMENSIONS)
            matrix = np.random.default_rng(0).normal(size=(COUNT, DIMENSIONS)).astype(np.float32)
            client.upsert("points", [{"id": f"p{i}", "text": f"point {i}"} for i in range(COUNT)], vectors=matrix)
        yield process.address


@pytest.fixture
def points(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client
        for collection in client.collections():
            if collection.name != "points":
                client.delete_collection(collection.name)


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def nothing_but_points(data_dir: Path) -> bool:
    return len(names_in(data_dir / "collections")) == 1


def test_a_backup_is_written_and_restored_with_progress(points: Client, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    path = tmp_path / "points.backup"
    path.write_text("an older one")
    size = points.backup_collection("points", path, progress=lambda *done: reported.append(done))
    assert path.stat().st_size == size > COUNT * DIMENSIONS * 4
    assert reported[0] == (2**20, size)
    assert reported[-1] == (size, size)
    assert names_in(tmp_path) == [path.name]
    reported.clear()
    copy = points.restore_collection("copy", path, progress=lambda *done: reported.append(done))
    assert reported[-1] == (size, size)
    original = points.get_collection("points")
    for field in ("record_count", "dimensions", "sequence", "create_time"):
        assert getattr(copy, field) == getattr(original, field)
    found = points.get("copy", ["p7", "p8"], with_vectors=True)
    for mine, theirs in zip(found, points.get("points", ["p7", "p8"], with_vectors=True), strict=True):
        assert mine.vector is not None
        assert theirs.vector is not None
        assert (mine.text, mine.revision, mine.vector.tobytes()) == (
            theirs.text,
            theirs.revision,
            theirs.vector.tobytes(),
        )
    assert points.verify_collection("copy").ok
    with pytest.raises(AlreadyExists):
        points.restore_collection("copy", path)


async def test_the_asynchronous_client_backs_up_and_restores(points: Client, address: str, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    async with AsyncClient(address) as client:
        path = tmp_path / "points.backup"
        size = await client.backup_collection("points", path, progress=lambda *done: reported.append(done))
        copy = await client.restore_collection("copy", path, progress=lambda *done: reported.append(done))
        assert copy.record_count == COUNT
        assert reported.count((size, size)) >= 2
        with pytest.raises(NotFound):
            await client.backup_collection("none", tmp_path / "none")
        (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InvalidArgument, match="cut off"):
            await client.restore_collection("other", tmp_path / "cut")
        with pytest.raises(FileNotFoundError):
            await client.restore_collection("other", tmp_path / "none")
    assert names_in(tmp_path) == ["cut", "points.backup"]


def test_a_restored_collection_needs_its_model_only_for_texts(client: Client, points: Client, tmp_path: Path) -> None:
    client.create_collection("pets", model="minilm", indexed_fields=["kind"])
    client.upsert("pets", [{"id": "a", "text": "a kitten asleep", "metadata": {"kind": "cat"}}])
    path = tmp_path / "pets.backup"
    client.backup_collection("pets", path)
    client.delete_collection("pets")
    client.restore_collection("pets", path)
    assert [hit.record.id for hit in client.search("pets", "a sleeping cat", where='kind = "cat"')] == ["a"]
    (vector,) = [record.vector for record in client.get("pets", ["a"], with_vectors=True)]
    client.delete_collection("pets")
    assert vector is not None
    assert points.restore_collection("pets", path).model == "minilm"
    assert [hit.record.id for hit in points.search("pets", vector)] == ["a"]
    with pytest.raises(NotFound, match="'minilm'"):
        points.search("pets", "a sleeping cat")


def test_the_command_backup_replaces_a_file_only_with_overwrite(
    points: Client, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBERPC_TARGET", address)
    path = tmp_path / "points.backup"
    backup = ["collection", "backup", "points", "-o", str(path)]
    assert main(backup) == 0
    before = path.stat().st_mtime_ns
    assert f"bytes\t{path.stat().st_size}" in capsys.readouterr().out
    assert main(backup) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    assert main([*backup, "--overwrite"]) == 0
    assert main(["collection", "restore", "copy", str(path)]) == 0
    assert f"record_count\t{COUNT}" in capsys.readouterr().out
    assert main(["collection", "restore", "copy", str(path)]) == 5
    assert main(["collection", "restore", "other", str(tmp_path / "none")]) == 2
    assert main(["collection", "backup", "none", "-o", str(tmp_path / "none")]) == 4
    assert main(["collection", "backup", "points", "-o", str(tmp_path / "no" / "folder")]) == 2
    assert names_in(tmp_path) == [path.name]


def test_a_backup_to_an_invalid_file_is_refused_before_any_call(points: Client, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder"):
        points.backup_collection("points", tmp_path)
    with pytest.raises(FileNotFoundError):
        points.backup_collection("points", tmp_path / "none" / "file")


def test_an_exception_of_the_progress_callback_is_raised_to_the_caller(points: Client, tmp_path: Path) -> None:
    path = tmp_path / "points.backup"
    points.backup_collection("points", path)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        points.restore_collection("copy", path, progress=fail)
    with pytest.raises(RuntimeError, match="no more"):
        points.backup_collection("points", path, progress=fail)
    assert names_in(tmp_path) == [path.name]


Requests = Iterable[pb.RestoreCollectionRequest]
WRONG: dict[str, tuple[Requests, str]] = {
    "no message": ([], "name is missing"),
    "no name": ([pb.RestoreCollectionRequest(chunk=b"x")], "name is missing"),
    "a wrong name": ([pb.RestoreCollectionRequest(name="../x")], "name is '../x'"),
    "no sha256": ([pb.RestoreCollectionRequest(name="copy", chunk=b"x")], "sha256 is missing"),
    "a wrong sha256": ([pb.RestoreCollectionRequest(name="copy", chunk=b"x", sha256="0" * 64)], "send it again"),
    "another name": (
        [pb.RestoreCollectionRequest(name="copy"), pb.RestoreCollectionRequest(name="other")],
        "name is 'other'",
    ),
    "a message after the last": (
        [pb.RestoreCollectionRequest(name="copy", sha256="0" * 64), pb.RestoreCollectionRequest(chunk=b"x")],
        "not the last",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_restore_messages_out_of_order_are_refused_and_leave_no_files(
    points: Client, address: str, data_dir: Path, what: str
) -> None:
    sent, words = WRONG[what]
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        index_pb2_grpc.IndexServiceStub(channel).RestoreCollection(iter(sent))
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in str(refused.value.details())
    wait_until(lambda: nothing_but_points(data_dir))


async def test_a_cancelled_backup_or_restore_leaves_no_files(points: Client, address: str, data_dir: Path) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        for _ in range(3):
            backup = stub.BackupCollection(pb.BackupCollectionRequest(name="points"))
            first = await backup.read()
            assert isinstance(first, pb.BackupCollectionResponse)
            backup.cancel()
            restore = stub.RestoreCollection()
            await restore.write(pb.RestoreCollectionRequest(name="copy", chunk=first.chunk))
            restore.cancel()
        # More calls than may run at once were cancelled; a later call must still run.
        backup = stub.BackupCollection(pb.BackupCollectionRequest(name="points"))
        whole = b""
        async for piece in backup:
            whole += piece.chunk
        restore = stub.RestoreCollection()
        await restore.write(pb.RestoreCollectionRequest(name="copy", chunk=whole))
        await restore.write(pb.RestoreCollectionRequest(sha256=hashlib.sha256(whole).hexdigest()))
        await restore.done_writing()
        assert (await restore).collection.record_count == COUNT
    points.delete_collection("copy")
    wait_until(lambda: nothing_but_points(data_dir))


@asynccontextmanager
async def impatient(
    tmp_path: Path,
    stall_seconds: float = 0.5,
    contended_seconds: float = 60,
    count: int = 2000,
    observe: Observe | None = None,
    fixed_windows: bool = False,
) -> AsyncIterator[index_pb2_grpc.IndexServiceAsyncStub]:
    """Serve a collection; a call whose caller stops reading a backup, or sending a restore, is ended early.

    Args:
        tmp_path: the data directory.
        stall_seconds: seconds without progress after which a call is ended.
        contended_seconds: seconds without progress after which a call is ended if another caller waits for its slot.
        count: number of records, of 8 kB each; the default, 2000, makes a collection of 16 MB.
        observe: called when a call ends; see `Handlers`.
        fixed_windows: whether each side sends at most 64 KiB that the other side has not read; see `channel_to`.
    """
    with closing(Index(tmp_path)) as index, ThreadPoolExecutor(4) as pool:
        collection = index.create(CollectionSpec("points", 2000))
        collection.upsert([NewRecord(str(i)) for i in range(count)], np.ones((count, 2000), dtype=np.float32))
        backups = CollectionBackups(index, IndexPool(pool, heavy=2), stall_seconds, contended_seconds)

        async def find() -> CollectionBackend:
            return collection

        class Service(index_pb2_grpc.IndexServiceServicer):
            def BackupCollection(self, request: pb.BackupCollectionRequest, context: requests.Context) -> object:  # type: ignore[override]  # noqa: N802
                return backup_responses(backups, find, context)

            async def RestoreCollection(self, messages: object, context: requests.Context) -> object:  # type: ignore[override]  # noqa: N802
                await restore_from(backups, messages)  # type: ignore[arg-type]
                return pb.RestoreCollectionResponse()

        server = grpc.aio.server(options=FIXED_WINDOWS if fixed_windows else None)
        Handlers(server, observe).add(index_pb2_grpc.add_IndexServiceServicer_to_server, Service())
        async with channel_to(server, fixed_windows) as channel:
            yield index_pb2_grpc.IndexServiceStub(channel)


async def size_of(pieces: AsyncIterable[pb.BackupCollectionResponse]) -> int:
    return sum([len(piece.chunk) async for piece in pieces])


async def read_on(call: grpc.aio.UnaryStreamCall[Any, Any]) -> str:
    """Read a call to its end; return the message of its error, or an empty text."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.details() or "no message"
    return ""


async def test_a_backup_whose_caller_stops_reading_is_ended(tmp_path: Path) -> None:
    ended = asyncio.Event()
    async with impatient(tmp_path, observe=lambda *_: ended.set()) as stub:
        call = stub.BackupCollection(pb.BackupCollectionRequest(name="points"))
        await asyncio.wait_for(ended.wait(), 300)
        assert "nothing was read for 0.5 s" in await read_on(call)


async def test_a_restore_whose_caller_stops_sending_is_ended(tmp_path: Path) -> None:
    async with impatient(tmp_path) as stub:
        restore = stub.RestoreCollection()
        await restore.write(pb.RestoreCollectionRequest(name="copy", chunk=b"x" * 1000))
        with pytest.raises(grpc.aio.AioRpcError, match="nothing came for 0.5 s"):
            await asyncio.wait_for(restore, 300)
    assert nothing_but_points(tmp_path)


def first_message(name: str) -> pb.RestoreCollectionRequest:
    return pb.RestoreCollectionRequest(name=name, chunk=b"x" * 1000)


async def whole_backup(stub: index_pb2_grpc.IndexServiceAsyncStub) -> tuple[bytes, str]:
    """Return a backup of the collection, and its SHA-256."""
    pieces = [piece async for piece in stub.BackupCollection(pb.BackupCollectionRequest(name="points"))]
    return b"".join(piece.chunk for piece in pieces), pieces[-1].sha256


async def restored(stub: index_pb2_grpc.IndexServiceAsyncStub, data: bytes, sha256: str) -> None:
    """Restore a backup as `copy`."""

    async def messages() -> AsyncIterator[pb.RestoreCollectionRequest]:
        yield pb.RestoreCollectionRequest(name="copy", chunk=data[: 2**20])
        for start in range(2**20, len(data), 2**20):
            yield pb.RestoreCollectionRequest(chunk=data[start : start + 2**20])
        yield pb.RestoreCollectionRequest(sha256=sha256)

    await stub.RestoreCollection(messages())


async def test_streams_without_a_message_do_not_delay_other_restores(tmp_path: Path) -> None:
    async with impatient(tmp_path, stall_seconds=1e6, contended_seconds=1e6, count=200) as stub:
        silent = [stub.RestoreCollection() for _ in range(20)]
        for call in silent:
            await call.wait_for_connection()
        await asyncio.wait_for(restored(stub, *await whole_backup(stub)), 300)
        for call in silent:
            call.cancel()


async def test_silent_restores_are_ended_if_others_wait(tmp_path: Path) -> None:
    async with impatient(tmp_path, stall_seconds=1e6, contended_seconds=0.1, count=200) as stub:
        silent = [stub.RestoreCollection() for _ in range(2)]
        for i, call in enumerate(silent):
            await call.write(first_message(f"silent-{i}"))
        await asyncio.wait_for(restored(stub, *await whole_backup(stub)), 300)
        # The third restore ran, so one of the two was ended; its error may arrive later.
        ends = [asyncio.ensure_future(code_of(call)) for call in silent]
        await asyncio.wait(ends, timeout=300, return_when=asyncio.FIRST_COMPLETED)
        given_up = [call for call in silent if call.done()]
        assert given_up
        for call in given_up:
            with pytest.raises(grpc.aio.AioRpcError, match="nothing came for"):
                await call
        for call in silent:
            call.cancel()


async def test_restores_beyond_the_waiting_limit_are_refused_with_a_retry_delay(tmp_path: Path) -> None:
    async with impatient(tmp_path, stall_seconds=1e6, contended_seconds=1e6, count=200) as stub:
        calls = [stub.RestoreCollection() for _ in range(2 + 8 + 3)]
        for i, call in enumerate(calls):
            await call.write(first_message(f"c{i}"))
        waiting = {asyncio.ensure_future(code_of(call)) for call in calls}
        refused: set[asyncio.Future[tuple[grpc.StatusCode, str]]] = set()
        while len(refused) < 3:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused |= done
        assert [each.result() for each in refused] == [(grpc.StatusCode.RESOURCE_EXHAUSTED, "5000")] * 3
        for call in calls:
            call.cancel()
        # Cancelled restores do not delay the next one.
        await asyncio.wait_for(restored(stub, *await whole_backup(stub)), 300)


async def test_backups_beyond_the_waiting_limit_are_refused_with_a_retry_delay(tmp_path: Path) -> None:
    request = pb.BackupCollectionRequest(name="points")
    async with impatient(tmp_path, stall_seconds=1e6, contended_seconds=1e6) as stub:
        calls = [stub.BackupCollection(request) for _ in range(2 + 8 + 3)]
        # A backup that runs sends a first piece; the test reads no other.
        reading = {asyncio.ensure_future(call.read()) for call in calls}
        ended: list[asyncio.Future[object]] = []
        while len(ended) < 2 + 3:
            done, reading = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            ended += done
        errors = [each.exception() for each in ended if each.exception() is not None]
        assert [error.code() for error in errors if isinstance(error, grpc.aio.AioRpcError)] == [
            grpc.StatusCode.RESOURCE_EXHAUSTED
        ] * 3
        for call in calls:
            call.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def code_of(call: grpc.aio.StreamUnaryCall[Any, Any]) -> tuple[grpc.StatusCode, str]:
    """Return the status code of a call, and the milliseconds after which it may be repeated."""
    metadata = dict(tuple(await call.trailing_metadata() or ()))
    return await call.code(), str(metadata.get("grpc-retry-pushback-ms", ""))


async def test_stalled_backups_are_ended_if_others_wait(tmp_path: Path) -> None:
    request = pb.BackupCollectionRequest(name="points")
    # `stall_seconds` (1e6) ends a call without progress even if no caller waits. It is long, so that the third call,
    # whose caller reads, is not ended on a slow host. `contended_seconds` (0.1) ends a stalled call only while another
    # caller waits for a backup.
    # With `fixed_windows`, gRPC sends at most 64 KiB that the caller has not read. Otherwise gRPC may take the whole
    # backup from the server, which then would not notice that the caller does not read.
    async with impatient(tmp_path, stall_seconds=1e6, contended_seconds=0.1, fixed_windows=True) as stub:
        stalled = [stub.BackupCollection(request) for _ in range(2)]
        for call in stalled:
            await call.read()
        # Two backups run at once, so the third runs only if one of the two was ended.
        assert await asyncio.wait_for(size_of(stub.BackupCollection(request)), 300) > 16_000_000
        given_up = [message for call in stalled if (message := await read_on(call))]
    assert given_up
    assert all(re.match(r"nothing was read for \d+(\.\d)? s, so the call was ended", message) for message in given_up)
