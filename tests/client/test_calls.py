"""Requests of the two clients, and the results that they make of the responses."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import (
    AsyncClient,
    Client,
    FailedPrecondition,
    Health,
    InputError,
    InputTypeError,
    Internal,
    LabelScore,
    NotFound,
    Record,
    RecordId,
    ResponseDetails,
    UpsertResult,
)
from emberpc.client._core.embedding import _classification
from emberpc.client._core.models import _classifier
from emberpc.v1 import classification_pb2, index_pb2, types_pb2
from fake_server import DIMENSIONS, FakeServer, Fault, vector_of

TEXTS = [f"text number {i}" for i in range(1000)]
Shell = Any


def test_embed_keeps_the_order_of_many_requests_in_flight(fake: FakeServer, shell: Shell) -> None:
    matrix = shell("embed", TEXTS, batch_size=7)
    assert matrix.dtype == np.float32
    assert matrix.flags.owndata
    assert matrix.flags.writeable
    assert np.array_equal(matrix, np.stack([vector_of(text) for text in TEXTS]))
    assert {len(asked.request.texts) for asked in fake.asked["Embed"]} == {7, 1000 % 7}


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_in_flight_limits_the_requests_that_run_at_once(fake: FakeServer, shell_type: Any, in_flight: int) -> None:
    together = threading.Barrier(in_flight)
    lock, here, maximum = threading.Lock(), 0, 0

    def hook(_: Any) -> None:
        nonlocal here, maximum
        with lock:
            here += 1
            maximum = max(maximum, here)
        together.wait(300)  # fails unless enough calls wait here concurrently
        with lock:
            here -= 1

    fake.hooks["Embed"] = hook
    shell = shell_type(fake.target, in_flight=in_flight)
    try:
        shell("embed", TEXTS[: 6 * in_flight], batch_size=2)
    finally:
        shell.close()
    assert maximum == in_flight


def test_embed_sends_all_its_options(fake: FakeServer, shell: Shell) -> None:
    shell(
        "embed",
        ["a"],
        model="m",
        input_kind="query",
        dimensions=4,
        truncation="end",
        dtype="float16",
        normalize=False,
        priority="bulk",
    )
    request = fake.asked["Embed"][0].request
    assert (request.model, request.dimensions, list(request.texts)) == ("m", 4, ["a"])
    assert request.input_kind == types_pb2.INPUT_KIND_QUERY
    assert request.truncation == types_pb2.TRUNCATION_END
    assert request.dtype == types_pb2.DATA_TYPE_FLOAT16
    assert request.priority == types_pb2.PRIORITY_BULK
    assert request.HasField("normalize")
    assert not request.normalize
    shell("embed", ["a"])
    assert not fake.asked["Embed"][1].request.HasField("normalize")


def test_long_texts_are_sent_in_requests_below_the_message_limit(fake: FakeServer, shell: Shell) -> None:
    matrix = shell("embed", ["x" * 2**20] * 6)
    assert matrix.shape == (6, DIMENSIONS)
    assert [len(asked.request.texts) for asked in fake.asked["Embed"]] == [2, 2, 2]


def test_progress_is_called_with_the_number_of_finished_texts(shell: Shell) -> None:
    done: list[int] = []
    shell("embed", TEXTS[:10], batch_size=4, progress=done.append)
    shell("classify", TEXTS[:3], batch_size=2, progress=done.append)
    assert done == [4, 8, 10, 2, 3]


def test_count_tokens_keeps_the_order_of_texts(shell: Shell) -> None:
    assert shell("count_tokens", ["one", "one two", ""], batch_size=1) == [3, 4, 2]


def test_similarity_is_a_matrix_of_sources_by_targets(fake: FakeServer, shell: Shell) -> None:
    scores = shell("similarity", ["a", "b"], ["a", "c", "d"], source_kind="query")
    assert scores.shape == (2, 3)
    assert scores[0, 0] == pytest.approx(1)
    assert scores[1, 2] == pytest.approx(float(vector_of("b") @ vector_of("d")))
    request = fake.asked["ComputeSimilarity"][0].request
    assert request.source_kind == types_pb2.INPUT_KIND_QUERY
    assert request.target_kind == types_pb2.INPUT_KIND_PASSAGE


def test_classify_gives_labels_scores_and_rejections(shell: Shell) -> None:
    first, second, third = shell("classify", ["what is it?", "it is", "outside"], "kinds", top_k=1, batch_size=2)
    assert first.label == "question"
    assert first.scores == (LabelScore("question", 0.75),)
    assert second.labels == ("statement",)
    assert second.tokens == 4
    assert third.rejected
    assert third.label is None
    assert [each.rejection_score for each in (first, third)] == [0.75, 0.125]
    described = shell("get_classifier", "kinds")
    assert (described.rejection_score, described.rejection_threshold) == ("nearest_prototype", 0.25)


def test_an_older_server_states_no_rejection_score() -> None:
    older = classification_pb2.Classifier(rejects=True, rejection_threshold=3.5)
    assert (_classifier(older).rejection_score, _classifier(older).rejection_threshold) == (None, 3.5)
    assert _classification(classification_pb2.Classification()).rejection_score is None


def test_collections_are_created_listed_over_pages_and_deleted(fake: FakeServer, shell: Shell) -> None:
    for name in "abcdefg":
        shell("create_collection", name, dimensions=3, distance="euclidean", truncation="start", m=8)
    assert [collection.name for collection in shell("collections")] == list("abcdefg")
    assert len(fake.asked["ListCollections"]) == 3
    collection = shell("get_collection", "c")
    assert (collection.dimensions, collection.distance, collection.truncation) == (3, "euclidean", "start")
    assert (collection.m, collection.ef_construction) == (8, 0)
    assert collection.create_time == datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=timezone.utc)
    assert shell("delete_collection", "c") is None
    with pytest.raises(NotFound, match="there is no collection 'c'"):
        shell("get_collection", "c")


def test_a_record_is_read_as_written(shell: Shell) -> None:
    shell("create_collection", "c")
    metadata = {"whole": 3, "part": 0.5, "none": None, "yes": True, "deep": {"list": [1, "two", [3.5], {"four": 4}]}}
    given = Record("a", "a text", metadata, "label")
    assert shell("upsert", "c", [given]) == UpsertResult(1, 0, 1)
    (record,) = shell("get", "c", ["a"])
    assert record == given
    assert type(record.metadata["whole"]) is int
    assert record.vector is None


def test_upserts_are_sent_in_order_and_added_up(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    taken: list[int] = []

    def records() -> Any:
        for i in range(10):
            taken.append(len(fake.asked["UpsertRecords"]))
            yield {"id": str(i % 9), "text": f"text {i}"}

    done: list[int] = []
    assert shell("upsert", "c", records(), batch_size=4, progress=done.append) == UpsertResult(9, 1, 3)
    assert done == [4, 8, 10]
    assert taken == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]  # each request is answered before the next one's records are taken
    assert shell("upsert", "c", []) == UpsertResult(0, 0, 0)
    assert len(fake.asked["UpsertRecords"]) == 3


@pytest.mark.parametrize("own", [True, False], ids=["vectors in the records", "vectors as an argument"])
def test_vectors_of_the_caller_are_sent_with_the_records(fake: FakeServer, shell: Shell, own: bool) -> None:
    shell("create_collection", "c")
    matrix = np.arange(40, dtype=np.float64).reshape(5, DIMENSIONS)
    records = [{"id": str(i), **({"vector": row.tolist()} if own else {})} for i, row in enumerate(matrix)]
    shell("upsert", "c", records, vectors=None if own else matrix, batch_size=2)
    found = shell("get", "c", [str(i) for i in range(5)], with_vectors=True)
    assert np.array_equal(np.stack([record.vector for record in found]), matrix)
    found[0].vector[0] = 7  # the array is writable


def test_records_copied_with_their_vectors_are_not_embedded_again(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "from")
    shell("create_collection", "to")
    shell("upsert", "from", [{"id": str(i), "text": f"text {i}"} for i in range(5)])
    shell("upsert", "to", shell("records", "from", with_vectors=True))
    assert fake.asked["UpsertRecords"][-1].request.HasField("vectors")
    assert shell("count", "to") == 5


def test_records_iterates_over_all_pages(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    shell("upsert", "c", [{"id": str(i), "text": "t"} for i in range(8)])
    assert [record.id for record in shell("records", "c", page_size=2)] == list("01234567")
    assert len(fake.asked["ListRecords"]) == 4


def test_get_and_delete_divide_many_ids_into_requests(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    shell("upsert", "c", [{"id": f"{i:04}", "text": "t"} for i in range(1500)])
    ids = [f"{i:04}" for i in range(0, 3000, 2)]
    assert [record.id for record in shell("get", "c", ids)] == ids[:750]
    assert shell("delete", "c", ids) == 750
    assert len(fake.asked["DeleteRecords"]) == 2
    assert shell("count", "c") == 750


def test_search_accepts_a_text_a_vector_or_a_record_id(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    shell("upsert", "c", [{"id": text, "text": text} for text in "abcdef"])
    by_text = shell("search", "c", "d", top_k=3, ef=50)
    assert by_text[0].record.id == "d"
    assert by_text[0].score == pytest.approx(1)
    by_vector = shell("search", "c", vector_of("d"), top_k=3)
    assert [hit.record.id for hit in by_vector] == [hit.record.id for hit in by_text]
    assert shell("search", "c", vector_of("d").tolist(), top_k=3) == by_vector
    by_record = shell("search", "c", RecordId("d"), top_k=2, with_vectors=True)
    assert [hit.record.id for hit in by_record] == [hit.record.id for hit in by_text[1:]]
    assert np.array_equal(by_record[0].record.vector, vector_of(by_record[0].record.id))
    request = fake.asked["Search"][0].request
    assert (request.top_k, request.ef) == (3, 50)
    assert list(request.parts) == [index_pb2.RECORD_PART_TEXT, index_pb2.RECORD_PART_METADATA]


def test_search_batch_keeps_the_order_of_queries_and_returns_the_plan(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    shell("upsert", "c", [{"id": text, "text": text} for text in "abc"])
    results = shell("search_batch", "c", ["a", RecordId("b"), vector_of("c")] * 50)
    assert len(fake.asked["Search"]) == 2
    assert [result.hits[0].record.id for result in results[::3]] == ["a"] * 50
    assert [result.hits[0].record.id for result in results[2::3]] == ["c"] * 50
    assert all("b" not in [hit.record.id for hit in result.hits] for result in results[1::3])
    assert results[0].plan.strategy == "exact"
    assert results[0].plan.shortfall_reason == "the collection has 3 records"
    assert shell("search_batch", "c", np.stack([vector_of("b")]))[0].hits[0].record.id == "b"
    assert shell("search_batch", "c", []) == []


def test_models_and_get_model_return_descriptions_of_models(shell: Shell) -> None:
    first, second = shell("models")
    assert (first.name, first.task, first.state, first.dimensions) == ("canned", "embedding", "ready", DIMENSIONS)
    assert list(first.quality.items()) == [("ece", 0.01234560000000012), ("parity.cosine_min", 0.9999998211860657)]
    assert second.labels == ("question", "statement")
    assert shell("get_model", "kinds") == second
    with pytest.raises(NotFound):
        shell("get_model", "other")


def test_health_calls_the_standard_health_service(fake: FakeServer, shell: Shell) -> None:
    assert shell("health") is Health.SERVING
    fake.health.set("", 2)
    assert shell("health") is Health.NOT_SERVING
    with pytest.raises(NotFound):
        shell("health", "no.such.Service")


def test_an_enum_value_of_a_newer_server_is_read_as_unknown(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    fake.collections["c"].distance = 77  # type: ignore[assignment]  # as an enum grown later would send
    assert shell("get_collection", "c").distance == "unknown"


def test_every_call_has_a_deadline(fake: FakeServer, shell: Shell) -> None:
    shell("models")
    shell("models", timeout=100)
    first, second = fake.asked["ListModels"]
    # On the wire a deadline is rounded up.
    assert 200 < first.seconds_left < 303
    assert 90 < second.seconds_left < 103


def test_the_token_is_sent_with_every_call(fake: FakeServer, shell_type: Any) -> None:
    shell = shell_type(fake.target, token="secret-1")
    try:
        shell("models")
        shell("embed", ["a"])
    finally:
        shell.close()
    for asked in (*fake.asked["ListModels"], *fake.asked["Embed"]):
        assert asked.metadata["authorization"] == "Bearer secret-1"


async def test_a_channel_of_the_caller_is_used_and_not_closed(fake: FakeServer) -> None:
    with grpc.insecure_channel(fake.target) as channel:
        for _ in range(2):
            with Client(channel=channel) as client:
                assert client.health() is Health.SERVING
    async with grpc.aio.insecure_channel(fake.target) as channel:
        for _ in range(2):
            async with AsyncClient(channel=channel) as client:
                assert await client.health() is Health.SERVING


def test_a_response_with_another_number_of_items_is_refused(fake: FakeServer, shell: Shell) -> None:
    def drop_one(request: Any) -> None:
        del request.texts[0]

    for method, rpc in (("embed", "Embed"), ("count_tokens", "CountTokens"), ("classify", "Classify")):
        fake.hooks[rpc] = drop_one
        with pytest.raises(Internal, match=r"answered with 1 .* for 2"):
            shell(method, ["a", "b"])


def test_vectors_of_different_dimensions_from_one_target_are_refused(fake: FakeServer, shell: Shell) -> None:
    def shrink(request: Any) -> None:
        if request.texts[0] == "b":
            request.dimensions = 3

    fake.hooks["Embed"] = shrink
    with pytest.raises(Internal, match="of 8 dimensions, then of 3"):
        shell("embed", ["a", "b"], batch_size=1)


def test_vectors_of_two_models_are_refused(fake: FakeServer, shell: Shell) -> None:
    def change(_: Any) -> None:
        fake.fingerprint = str(len(fake.asked["Embed"]))

    fake.hooks["Embed"] = change
    assert len(shell("embed", TEXTS[:3], batch_size=3)) == 3
    with pytest.raises(Internal, match="vectors of two models, which cannot be compared"):
        shell("embed", TEXTS[:6], batch_size=2)


def test_load_and_reload_report_stages_and_return_the_model(shell: Shell, fake: FakeServer) -> None:
    stages: list[str] = []
    model = shell("load_model", "m", "folder", variant="int8", progress=stages.append)
    assert (model.name, model.state, stages) == ("m", "ready", ["warming up", "ready"])
    assert shell("reload_model", "m").state == "ready"
    assert shell("unload_model", "m") is None
    request = fake.asked["LoadModel"][0].request
    assert (request.name, request.path, request.variant) == ("m", "folder", "int8")
    fake.faults["ReloadModel"].append(Fault(grpc.StatusCode.FAILED_PRECONDITION, "no bundle", "MODEL_UNFIT"))
    with pytest.raises(FailedPrecondition, match="no bundle") as error:
        shell("reload_model", "m")
    assert error.value.reason == "MODEL_UNFIT"
    with pytest.raises(InputTypeError):
        shell("load_model", "m", 7)


def test_expected_revisions_are_sent_with_their_records(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    records = [Record(str(i), "t") for i in range(5)]
    shell("upsert", "c", iter(records), expected_revisions=iter([0, 1, 2, 3, 2**63 - 1]), batch_size=2)
    asked = [list(asked.request.expected_revisions) for asked in fake.asked["UpsertRecords"]]
    assert asked == [[0, 1], [2, 3], [2**63 - 1]]


@pytest.mark.parametrize(
    ("expected", "error", "words"),
    [
        ([1], InputError, r"expected_revisions has 1 items for 2 records; give one for each"),
        ([1, 2, 3], InputError, r"has 3 items for 2 records"),
        ([1, -1], InputError, r"expected_revisions\[1\] is -1; it must be at least 0$"),
        ([1, 2**63], InputError, r"expected_revisions\[1\] is 9223372036854775808"),
        ([1, None], InputTypeError, r"expected_revisions\[1\] is of type NoneType"),
        (7, InputTypeError, r"expected_revisions is of type int"),
    ],
)
def test_invalid_expected_revisions_are_refused_before_any_request(
    fake: FakeServer, shell: Shell, expected: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shell("upsert", "c", [Record("a", "t"), Record("b", "t")], expected_revisions=expected, batch_size=1)
    assert "UpsertRecords" not in fake.asked


@pytest.mark.parametrize("field", ["revision", "create_time", "update_time"])
def test_a_record_whose_output_fields_were_set_by_hand_is_refused(shell: Shell, field: str) -> None:
    value: Any = 99 if field == "revision" else datetime(2026, 1, 1, tzinfo=timezone.utc)
    record = Record("a", "t", **{field: value})
    with pytest.raises(InputError, match=rf"records\[0\]\.{field} is .*only the server sets.*expected_revisions"):
        shell("upsert", "c", [record])


def test_a_record_from_a_response_can_be_upserted_again(fake: FakeServer, shell: Shell) -> None:
    shell("create_collection", "c")
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    shell("upsert", "c", [Record("a", "t", revision=4, create_time=now, update_time=now)], expected_revisions=[4])
    assert list(fake.asked["UpsertRecords"][0].request.expected_revisions) == [4]
    assert fake.asked["UpsertRecords"][0].request.records[0].revision == 0


@pytest.mark.parametrize(
    ("name", "arguments", "options", "words"),
    [
        ("duplicates", ("c",), {"min_score": "0.9"}, "min_score is of type str"),
        ("verify_collection", ("c",), {"full": "yes"}, "full is of type str"),
        ("verify_collection", ("c",), {"progress": 3}, "progress is of type int"),
        ("backup_collection", ("c", "/dev/null"), {"progress": 3}, "progress is of type int"),
        ("restore_collection", ("c", "/dev/null"), {"progress": 3}, "progress is of type int"),
        ("load_model", ("m", "path"), {"progress": 3}, "progress is of type int"),
        ("create_collection", ("c",), {"exist_ok": "yes"}, "exist_ok is of type str"),
        ("embed", (["a"],), {"normalize": "no"}, "normalize is of type str"),
        ("embed_stream", (["a"],), {"normalize": 1}, "normalize is of type int"),
        ("get", ("c", ["a"]), {"with_vectors": "no"}, "with_vectors is of type str"),
        ("search", ("c", "a"), {"min_recall": None}, "min_recall is of type NoneType"),
    ],
)
def test_an_option_of_a_wrong_type_is_named_in_the_error(
    shell: Shell, name: str, arguments: tuple[Any, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputTypeError, match=words):
        shell(name, *arguments, **options)


def test_details_state_the_tokens_of_each_classified_text(shell: Shell) -> None:
    seen: list[ResponseDetails] = []
    found = shell("classify", ["a b", "c", "d e f"], "kinds", batch_size=2, details=seen.append)
    assert [(each.first, each.count) for each in seen] == [(0, 2), (2, 1)]
    assert [usage.tokens for each in seen for usage in each.usages] == [item.tokens for item in found] == [4, 3, 5]
