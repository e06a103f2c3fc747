"""Every field of the API that servers support can be set or read with the client."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from api_fields import UNSERVED, WHERE, fields_of, filled, methods, set_fields
from emberpc.client import Client, EmberpcError, Record, RecordId, SearchQuery
from emberpc.client._core.rpc_call import Call, Steps
from emberpc.v1 import classification_pb2

#: Fields that no method sets or returns, and why.
UNREACHED = {
    "ClassifyRequest.nearest_examples": "no server has classifiers made from examples yet",
    "Classification.nearest_examples": "no server has classifiers made from examples yet",
    "ComputeSimilarityResponse.rows": "the number of sources, which the caller knows",
    "ComputeSimilarityResponse.columns": "the number of targets, which the caller knows",
    "UpsertRecordsStreamResponse.model_fingerprint": "read when a stream is opened again; test_reembedding.py",
    "VerifyCollectionResponse.done": "the end of the iteration states the same",
    "ErrorStatus.details": "packed messages; test_failures.py reads them",
}


def everything_on(client: Client, folder: Path, seen: list[Any]) -> None:
    """Call every method with every option."""
    details: Callable[..., None] = lambda *values: seen.append(values)  # noqa: E731 - progress, details and steps alike
    texts = {"model": "m", "truncation": "end"}
    embedding = {**texts, "input_kind": "query", "dimensions": 2, "dtype": "int8", "normalize": True}
    search = {
        "top_k": 2,
        "where": WHERE,
        "mode": "hybrid",
        "dense_weight": 0.5,
        "fusion": "ranks",
        "with_vectors": True,
    }
    record = Record("a", "text", {"k": "v"}, "label", time_to_live=1)
    file = folder / "file"
    file.write_bytes(b"x")
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("embed", (["t"],), {**embedding, "priority": "bulk", "details": details}),
        ("embed_stream", ([("id", "t"), "u"],), {**embedding, "priority": "bulk"}),
        ("count_tokens", (["t"],), {"model": "m", "input_kind": "query", "details": details}),
        ("similarity", (["s"], ["t"]), {**texts, "source_kind": "query", "target_kind": "query", "details": details}),
        ("classify", (["t"], "c"), {"top_k": 1, "truncation": "end", "priority": "bulk", "details": details}),
        (
            "create_collection",
            ("c",),
            {**texts, "dimensions": 2, "distance": "euclidean", "m": 4, "ef_construction": 16, "indexed_fields": ["f"]},
        ),
        ("get_collection", ("c",), {}),
        ("collections", (), {"page_size": 1}),
        ("update_collection", ("c", "end"), {}),
        ("delete_collection", ("c",), {}),
        ("reembed_collection", ("c", "m"), {"dimensions": 2}),
        ("cancel_reembedding", ("c",), {}),
        ("verify_collection", ("c",), {"full": True, "progress": details}),
        (
            "upsert",
            ("c", [record]),
            {"vectors": [[1.0, 2.0]], "truncation": "end", "expected_revisions": [1], "details": details},
        ),
        ("upsert_stream", ("c", [Record("a", "text", vector=np.ones(2, np.float32))]), {"truncation": "end"}),
        ("get", ("c", ["a"]), {"with_vectors": True, "details": details}),
        ("delete", ("c", ["a"]), {"details": details}),
        ("delete", ("c",), {"where": WHERE, "details": details}),
        ("records", ("c",), {"where": WHERE, "with_vectors": True, "page_size": 1}),
        ("count", ("c",), {"where": WHERE}),
        ("search", ("c", "t"), {**search, "ef": 1, "truncation": "start", "priority": "bulk", "details": details}),
        (
            "search_batch",
            ("c", [SearchQuery(RecordId("a"), WHERE, 1, 1), [1.0, 2.0]][:1]),
            {**search, "min_recall": 0.5, "details": details},
        ),
        ("search", ("c", [1.0, 2.0]), {}),
        ("duplicates", ("c",), {"min_score": 0.5, "page_size": 1}),
        ("clusters", ("c", 2), {"examples": 1}),
        ("backup_collection", ("c", folder / "backup"), {"progress": details}),
        ("restore_collection", ("c", file), {"progress": details}),
        ("models", (), {"page_size": 1}),
        ("get_model", ("m",), {}),
        ("classifiers", (), {"page_size": 1}),
        ("get_classifier", ("c",), {}),
        ("load_model", ("m", "p"), {"variant": "v", "progress": details}),
        ("reload_model", ("m", "p"), {"variant": "v", "progress": details}),
        ("unload_model", ("m",), {}),
        ("server_info", (), {}),
    ]
    for name, arguments, options in calls:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                result = getattr(client, name)(*arguments, **options)
                seen.append(list(result) if isinstance(result, Iterator) else result)
            seen.append([str(each.message) for each in warned])
        except EmberpcError as error:
            seen.append(str(error))


class StubRunner:
    """Answers every call with one response in which every field is set, and keeps the requests.

    Args:
        without: name of a field that responses do not have set, such as `Model.labels`.
    """

    def __init__(self, without: str = "") -> None:
        self.requests: list[Message] = []
        self._without = without

    def run(self, joined: Any, timeout: float | None) -> Any:
        for call in joined.calls:
            joined.take(call, self.run_one(call, timeout))
        return joined.result()

    def run_one(self, call: Call[Any, Any], timeout: float | None) -> Any:
        self.requests.append(call.request)
        return call.read(filled(call.method.response, self._without))

    def run_steps(self, call: Any, progress: Any, timeout: float | None) -> Any:
        steps = Steps(call, progress)
        steps.take(self.run_one(call, timeout))
        return steps.result()

    def responses(self, call: Any, timeout: float | None) -> Iterator[Any]:
        yield self.run_one(call, timeout)

    def upload(self, call: Any, requests: Iterator[Message], timeout: float | None) -> Any:
        self.requests += requests
        return self.run_one(call, timeout)

    def pages(self, page_call: Any, timeout: float | None) -> Iterator[Any]:
        self.requests.append(page_call("token").request)
        page = self.run_one(page_call(""), timeout)
        return iter([*page.items, page.next_token])

    def all_items(self, page_call: Any, timeout: float | None) -> list[Any]:
        return list(self.pages(page_call, timeout))

    def stream(self, state: Any, items: Any, timeout: float | None) -> Iterator[Any]:
        self.requests += state.opening()
        state.greeted = True
        for item in items:
            state.add(item)
        self.requests += list(state.requests())
        yield from self.run_one(state.call, timeout)


def client_with(runner: StubRunner) -> Client:
    client = Client("localhost:1")
    client.close()
    client._runner = runner  # type: ignore[assignment]  # that is the point
    return client


def test_every_field_is_set_by_a_request_or_changes_what_a_method_returns(tmp_path: Path) -> None:
    def outcome(without: str = "") -> tuple[str, StubRunner]:
        seen: list[Any] = []
        runner = StubRunner(without)
        everything_on(client_with(runner), tmp_path, seen)
        return repr(seen), runner

    complete, runner = outcome()
    assert "Error" not in complete
    wanted: set[str] = set()
    for method in methods():
        fields_of(method.input_type, wanted, UNREACHED)
        fields_of(method.output_type, wanted, UNREACHED)
    reached = {name for request in runner.requests for name in set_fields(request)}
    missed = [name for name in wanted - reached if outcome(name)[0] == complete]
    assert sorted(missed) == []


def test_the_lists_of_exempted_rpcs_and_fields_name_existing_ones() -> None:
    known: set[str] = set()
    for method in methods():
        fields_of(method.output_type, fields_of(method.input_type, known))
    assert set(UNREACHED) <= known
    assert set(UNSERVED) <= set(classification_pb2.DESCRIPTOR.services_by_name["ClassificationService"].methods_by_name)


@pytest.mark.parametrize("field", ["EmbedResponse.timings", "BatchGetRecordsResponse.missing_ids"])
def test_removing_a_field_changes_no_result_if_no_method_reads_it(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import emberpc.client._core.embedding
    import emberpc.client._core.records

    for module in (emberpc.client._core.embedding, emberpc.client._core.records):
        monkeypatch.setattr(module, "report", lambda *_: None)
    outcomes = []
    for without in ("", field):
        seen: list[Any] = []
        everything_on(client_with(StubRunner(without)), tmp_path, seen)
        outcomes.append(repr(seen))
    assert outcomes[0] == outcomes[1]
