"""Failed calls of the two clients: repetition, exceptions and messages."""

from __future__ import annotations

import asyncio
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import (
    Aborted,
    AlreadyExists,
    AsyncClient,
    Cancelled,
    Client,
    DataLoss,
    DeadlineExceeded,
    EmberpcError,
    FailedPrecondition,
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
)
from emberpc.client._core import retries
from emberpc.client.exceptions import Circumstances, _client_message
from fake_server import FakeServer, Fault
from ping_proxy import PingProxy

Shell = Any
UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "starting", "LOADING")


@pytest.mark.parametrize("failures", [1, 2])
def test_a_call_that_the_server_cannot_accept_yet_is_repeated(fake: FakeServer, shell: Shell, failures: int) -> None:
    fake.faults["Embed"].extend([UNAVAILABLE] * failures)
    assert shell("embed", ["a"]).shape == (1, 8)
    assert len(fake.asked["Embed"]) == failures + 1


def test_a_call_fails_after_five_tries(fake: FakeServer, shell: Shell) -> None:
    fake.faults["Embed"].extend([UNAVAILABLE] * 6)
    with pytest.raises(Unavailable, match="starting") as raised:
        shell("embed", ["a"])
    assert raised.value.reason == "LOADING"
    assert len(fake.asked["Embed"]) == 5


def test_a_request_of_several_megabytes_is_repeated(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    fake.faults["UpsertRecords"].append(UNAVAILABLE)
    vectors = np.ones((200, 8192), dtype=np.float32)  # 6.5 MB; gRPC's own limit for repeating is 256 KiB
    shell("upsert", "c", [{"id": str(i)} for i in range(200)], vectors=vectors)
    assert len(fake.asked["UpsertRecords"]) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL])
def test_calls_with_other_errors_are_not_repeated(fake: FakeServer, shell: Shell, code: grpc.StatusCode) -> None:
    fake.faults["Embed"].append(Fault(code, "no", "NO"))
    with pytest.raises(EmberpcError):
        shell("embed", ["a"])
    assert len(fake.asked["Embed"]) == 1


def test_a_client_reconnects_to_a_restarted_server(shell_type: Any) -> None:
    with FakeServer() as first:
        shell = shell_type(first.target, timeout=300)
        shell("models")
    again = FakeServer(port=first.port)
    starter = threading.Timer(0.5, again.__enter__)
    starter.start()
    try:
        assert len(shell("models")) == 2
    finally:
        shell.close()
        starter.join()
        again.__exit__(None, None, None)


@pytest.mark.parametrize(
    "kind",
    [
        Aborted,
        AlreadyExists,
        DataLoss,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unimplemented,
    ],
)
def test_each_status_code_has_its_exception_with_the_error_details(
    fake: FakeServer, shell: Shell, kind: type[EmberpcError]
) -> None:
    fault = Fault(kind.code, "it went wrong; do this", "THE_REASON", [("name", "is wrong")], retry_after=1.5)
    fake.faults["ListModels"].append(fault)
    with pytest.raises(kind) as raised:
        shell("models")
    error = raised.value
    assert type(error) is kind
    assert error.code is kind.code
    assert str(error) == error.message == "it went wrong; do this"
    assert error.reason == "THE_REASON"
    assert error.metadata == {"key": "value"}
    assert error.request_id == "request-7"
    assert error.retry_after == 1.5
    assert [(violation.field, violation.description) for violation in error.violations] == [("name", "is wrong")]
    assert isinstance(error.__cause__, grpc.RpcError)


def test_a_status_code_without_its_own_exception_raises_emberpc_error(fake: FakeServer, shell: Shell) -> None:
    fake.faults["ListModels"].append(Fault(grpc.StatusCode.OUT_OF_RANGE, "gone"))
    with pytest.raises(EmberpcError, match="gone") as raised:
        shell("models")
    assert type(raised.value) is EmberpcError
    assert raised.value.code is grpc.StatusCode.OUT_OF_RANGE


def test_damaged_details_do_not_hide_the_error(fake: FakeServer, shell: Shell) -> None:
    class Damaged(Fault):
        def end(self, context: grpc.ServicerContext) -> None:
            context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
            context.abort(self.code, self.message)

    fake.faults["ListModels"].append(Damaged(grpc.StatusCode.NOT_FOUND, "not here"))
    with pytest.raises(NotFound, match="not here") as raised:
        shell("models")
    assert raised.value.violations == ()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("embed", (["x" * 9000],)),
        ("embed_stream", (["x" * 9000],)),
        ("upsert", ("c", [{"id": "1", "text": "x" * 9000}])),
    ],
)
def test_the_error_for_a_request_over_the_limit_names_limit_and_remedy(
    shell_type: Any, call: str, arguments: tuple[Any, ...]
) -> None:
    """gRPC refuses the request with a message that names neither a setting nor a remedy."""
    with FakeServer(options=[("grpc.max_receive_message_length", 5000)]) as fake:
        shell = shell_type(fake.target)
        words = rf"the request has 90\d\d bytes, .*{fake.target} takes at most 5000 bytes .*higher --max-message-bytes"
        with pytest.raises(ResourceExhausted, match=words) as raised:
            shell(call, *arguments)
        assert raised.value.reason == "REQUEST_TOO_LARGE"
        assert raised.value.metadata == {"limit": "5000"}
        shell.close()


def test_an_error_names_the_place_of_a_text_in_the_whole_list(fake: FakeServer, shell: Shell) -> None:
    fault = Fault(
        grpc.StatusCode.INVALID_ARGUMENT,
        "texts[3] is empty; it is alike to texts[0] (and 1 more)",
        "INVALID_FIELD",
        [("texts[3]", "is empty; it is alike to texts[0]"), ("texts[12]", "is empty"), ("contexts[1]", "other")],
    )
    fake.hooks["Embed"] = lambda request: fake.faults["Embed"].append(fault if "30" in request.texts else None)
    with pytest.raises(InvalidArgument) as raised:
        shell("embed", [str(i) for i in range(100)], batch_size=20)
    assert raised.value.message == "texts[23] is empty; it is alike to texts[20] (and 1 more)"
    assert [violation.field for violation in raised.value.violations] == ["texts[23]", "texts[32]", "contexts[1]"]
    assert raised.value.violations[0].description == "is empty; it is alike to texts[20]"


def test_messages_name_option_values_of_the_client(fake: FakeServer, shell: Shell) -> None:
    said = "texts[0] has 600 tokens; shorten it, or set `truncation` to END or START"
    fault = Fault(
        grpc.StatusCode.INVALID_ARGUMENT, said, "INVALID_FIELD", [("texts[0]", "set `truncation` to END or START")]
    )
    fake.faults["Embed"].append(fault)
    with pytest.raises(InvalidArgument) as raised:
        shell("embed", ["a"])
    assert str(raised.value) == "texts[0] has 600 tokens; shorten it, or set `truncation` to 'end' or 'start'"
    assert raised.value.violations[0].description == "set `truncation` to 'end' or 'start'"
    own = "there is no model 'THE END' or \"START\" or BACKEND; search DENSE"
    fake.faults["Embed"].append(Fault(grpc.StatusCode.NOT_FOUND, own, "MODEL_NOT_FOUND"))
    with pytest.raises(NotFound) as other:
        shell("embed", ["a"])
    assert str(other.value) == "there is no model 'THE END' or \"START\" or BACKEND; search 'dense'"


def test_an_error_names_the_place_of_a_record_and_the_written_ones(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    fault = Fault(
        grpc.StatusCode.INVALID_ARGUMENT,
        "records[1].text is empty",
        "INVALID_FIELD",
        [("records[1].text", "is empty")],
    )
    fake.faults["UpsertRecords"].extend([None, fault])
    with pytest.raises(InvalidArgument, match=r"^records\[5\]\.text is empty; the first 4 records of this") as raised:
        shell("upsert", "c", ({"id": str(i), "text": "t"} for i in range(12)), batch_size=4)
    assert raised.value.violations[0].field == "records[5].text"
    assert shell("count", "c") == 4
    assert len(fake.asked["UpsertRecords"]) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("expected", [None, [0] * 5])
def test_an_error_of_a_later_request_says_which_records_are_written(
    fake: FakeServer, shell: Shell, code: grpc.StatusCode, expected: list[int] | None
) -> None:
    shell("create_collection", "c")
    records = [{"id": str(i), "text": "t"} for i in range(5)]
    options = {"expected_revisions": expected, "batch_size": 2}
    for written in (0, 4):
        fake.faults["UpsertRecords"].extend([*[None] * (written // 2), Fault(code, "it went wrong", "NO")])
        with pytest.raises(EmberpcError, match="^it went wrong") as raised:
            shell("upsert", "c", records, **options)
        assert (shell("count", "c"), raised.value.done) == (written, written)
        assert ("the first 4 records of this call are written already" in str(raised.value)) == bool(written)
        assert ("repeat it without them" in str(raised.value)) == bool(written and expected)
        assert raised.value.message == str(raised.value)


def test_an_error_of_a_later_request_says_which_ids_are_deleted(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    fake.faults["DeleteRecords"].extend([None, Fault(grpc.StatusCode.INTERNAL, "no", "NO")])
    with pytest.raises(Internal, match="^no; the first 1000 ids of this call are deleted already$") as raised:
        shell("delete", "c", [str(i) for i in range(1001)])
    assert raised.value.done == 1000


def test_an_error_stops_the_following_requests(fake: FakeServer, shell: Shell) -> None:
    fake.faults["Embed"].append(Fault(grpc.StatusCode.NOT_FOUND, "no model", "MODEL_NOT_FOUND"))
    with pytest.raises(NotFound):
        shell("embed", [str(i) for i in range(100)], batch_size=2)
    # Of 50 requests. Some may be sent after the failing one, before its error arrives.
    assert len(fake.asked["Embed"]) < 10


def test_an_invalid_record_stops_an_upsert_after_the_records_before_it(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    records = [{"id": str(i), "text": "t"} for i in range(6)]
    with pytest.raises(InputTypeError, match=r"records\[6\]\.text is of type int.*the first 6 records of"):
        shell("upsert", "c", [*records, {"id": "6", "text": 6}], batch_size=3)
    assert shell("count", "c") == 6
    with pytest.raises(InputError, match=r"records\[0\] has no id"):
        shell("upsert", "c", [{"text": "t"}])


def test_a_call_without_an_answer_in_time_raises_deadline_exceeded(fake: FakeServer, shell: Shell) -> None:
    done = threading.Event()
    fake.hooks["Embed"] = lambda _: done.wait(300)
    try:
        with pytest.raises(DeadlineExceeded, match=rf"no response from {fake.target} within 0\.2 s; give a longer"):
            shell("embed", ["a"], timeout=0.2)
    finally:
        done.set()


def test_the_error_for_an_unreachable_server_names_address_and_remedy(shell_type: Any) -> None:
    with FakeServer() as gone:
        pass
    shell = shell_type(gone.target)
    try:
        with pytest.raises(Unavailable, match=rf"no emberpc server answers at {gone.target}; .*`emberpc serve`"):
            shell("health")
    finally:
        shell.close()


def test_the_error_for_too_many_calls_of_a_connection_names_the_cause() -> None:
    call = Circumstances("host:1", "/emberpc.v1.EmbeddingService/Embed", 1.0)
    details = "Stream removed (RST_STREAM with error code 7)"
    message = _client_message(grpc.StatusCode.UNAVAILABLE, details, call)
    assert message.startswith("the server at host:1 refused /emberpc.v1.EmbeddingService/Embed, since too many calls")


def test_a_server_without_the_emberpc_services_raises_unimplemented(shell_type: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = grpc.server(pool)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        shell = shell_type(f"127.0.0.1:{port}")
        try:
            with pytest.raises(Unimplemented, match=r"does not know /emberpc\.v1\.ModelService/ListModels"):
                shell("models")
        finally:
            shell.close()
            other.stop(0).wait()


def test_closing_a_client_ends_its_calls(fake: FakeServer) -> None:
    arrived, done = threading.Event(), threading.Event()

    def hook(_: Any) -> None:
        arrived.set()
        done.wait(300)

    fake.hooks["Embed"] = hook
    client = Client(fake.target)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.embed, ["a"])
        assert arrived.wait(300)
        client.close()
        with pytest.raises(Cancelled):
            answer.result(300)
        done.set()


async def test_a_cancelled_task_cancels_its_requests(fake: FakeServer) -> None:
    loop = asyncio.get_running_loop()
    arrived = asyncio.Queue[None]()
    done = threading.Event()
    ended = threading.Semaphore(0)

    def hook(_: Any) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, None)
        done.wait(300)
        ended.release()

    fake.hooks["Embed"] = hook
    async with AsyncClient(fake.target) as client:
        task = asyncio.create_task(client.embed(["a", "b", "c"], batch_size=1))
        for _ in range(2):
            await asyncio.wait_for(arrived.get(), 300)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    done.set()
    for _ in range(2):
        assert ended.acquire(timeout=300)
    assert len(fake.asked["Embed"]) == 2  # the third was never sent


def test_errors_can_be_pickled() -> None:
    error = NotFound("there is none", reason="MODEL_NOT_FOUND", request_id="r", retry_after=2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is NotFound
    assert (copy.message, copy.reason, copy.request_id, copy.retry_after) == (
        "there is none",
        "MODEL_NOT_FOUND",
        "r",
        2,
    )


def test_many_threads_may_use_one_client(fake: FakeServer) -> None:
    with Client(fake.target) as client, ThreadPoolExecutor(8) as pool:
        texts = [[f"{i}", f"{i} again"] for i in range(64)]
        for wanted, got in zip(map(client.embed, texts), pool.map(client.embed, texts), strict=True):
            assert np.array_equal(wanted, got)


@pytest.mark.parametrize("rpc", ["Embed", "VerifyCollection", "UpsertRecords"])
def test_a_broken_call_that_ran_for_long_is_not_repeated(
    fake: FakeServer, shell_type: Any, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    name, arguments = {
        "Embed": ("embed", (["a"],)),
        "VerifyCollection": ("verify_collection", ("c",)),
        "UpsertRecords": ("upsert", ("c", [{"id": "a", "text": "a"}])),
    }[rpc]
    with PingProxy(fake.target, 1) as proxy:
        shell = shell_type(proxy.target, timeout=300)
        try:
            shell("create_collection", "c")
            monkeypatch.setattr(retries, "_SOON", -1.0)  # every call counts as long
            fake.hooks[rpc] = lambda _: proxy.cut()
            with pytest.raises(
                Unavailable, match=rf"the connection to .* broke while .*/{rpc} was running; it was not"
            ):
                shell(name, *arguments)
            assert len(fake.asked[rpc]) == 1
            fake.hooks.pop(rpc)
            # The client connects again. The call may still be sent on the broken connection, and is repeated then.
            monkeypatch.setattr(retries, "_SOON", 1000.0)
            shell(name, *arguments)
        finally:
            shell.close()


def test_a_call_that_breaks_soon_is_repeated(
    fake: FakeServer, shell_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_SOON", 1000.0)  # every call counts as short, also on a slow host
    with PingProxy(fake.target, 1) as proxy:
        shell = shell_type(proxy.target, timeout=300)
        broken = iter([proxy.cut])
        fake.hooks["Embed"] = lambda _: next(broken, lambda: None)()
        try:
            assert shell("embed", ["a"]).shape == (1, 8)
        finally:
            shell.close()
    assert len(fake.asked["Embed"]) == 2


@pytest.mark.parametrize("failures", [1, 5])
def test_a_call_with_several_responses_is_repeated_before_the_first(
    fake: FakeServer, shell: Shell, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(retries, "_SOON", 1000.0)
    shell("create_collection", "c")
    fake.faults["VerifyCollection"].extend([UNAVAILABLE] * failures)
    if failures < 5:
        assert shell("verify_collection", "c").ok
    else:
        with pytest.raises(Unavailable, match="starting"):
            shell("verify_collection", "c")
    assert len(fake.asked["VerifyCollection"]) == min(failures + 1, 5)
