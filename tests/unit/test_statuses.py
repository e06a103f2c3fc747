"""Errors as sent to callers: any error fits into the metadata of a response."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.errors import Code, ServiceError, Violation, invalid_fields
from emberpc.server.statuses import status_of
from emberpc.v1 import errors_pb2
from emberpc.wire import status

#: By default, gRPC refuses metadata of a response above 8 KiB.
_METADATA_BYTES = 8 * 1024

texts = st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=5), st.sampled_from([1, 100, 20_000]))


def size_on_the_wire(reported: errors_pb2.ErrorStatus) -> int:
    """Return the greatest size of the metadata in bytes: the message percent-encoded, the details in base64."""
    return 3 * len(reported.message.encode()) + 4 * (len(reported.SerializeToString()) + 2) // 3


def violations_of(reported: errors_pb2.ErrorStatus) -> list[errors_pb2.BadRequest.FieldViolation]:
    bad = status.detail(reported, errors_pb2.BadRequest)
    assert bad is not None
    return list(bad.field_violations)


@given(
    message=texts,
    violations=st.lists(st.builds(Violation, texts, texts), max_size=3),
    times=st.sampled_from([1, 1000]),
    metadata=st.dictionaries(st.text(min_size=1, max_size=20), texts, max_size=5),
)
def test_any_error_fits_into_the_metadata_of_a_response(
    message: str, violations: list[Violation], times: int, metadata: dict[str, str]
) -> None:
    error = ServiceError(
        Code.INVALID_ARGUMENT, message, violations=violations * times, metadata=metadata, retry_after=1.0
    )
    assert size_on_the_wire(status_of(error, "r" * 128)) < _METADATA_BYTES - 512  # keys, request id and pushback


def test_the_first_violations_are_listed_and_the_others_counted() -> None:
    wrong = [Violation(f"texts[{i}]", "is empty; leave it out or give it some text") for i in range(400)]
    listed = violations_of(status_of(invalid_fields(wrong), "id"))
    assert len(listed) > 10
    assert [each.field for each in listed[:-1]] == [f"texts[{i}]" for i in range(len(listed) - 1)]
    assert listed[-1].description == f"{401 - len(listed)} more violations are not listed"


def test_a_single_violation_of_any_length_is_listed() -> None:
    (only,) = violations_of(status_of(invalid_fields([Violation("f" * 10_000, "d" * 10_000)]), "id"))
    assert only.field.startswith("fff")
    assert only.description.endswith("ddd")


def test_a_long_message_keeps_its_remedy() -> None:
    reported = status_of(ServiceError(Code.NOT_FOUND, f"there is no model {'é' * 50_000!r}; load it first"), "id")
    assert reported.message.startswith("there is no model 'é")
    assert reported.message.endswith("; load it first")


def test_short_errors_are_sent_unchanged() -> None:
    error = ServiceError(
        Code.INVALID_ARGUMENT, "wrong", violations=[Violation("a", "b"), Violation("c", "d")], metadata={"k": "v"}
    )
    reported = status_of(error, "id")
    assert reported.message == "wrong"
    assert [(each.field, each.description) for each in violations_of(reported)] == [("a", "b"), ("c", "d")]
    info = status.detail(reported, errors_pb2.ErrorInfo)
    assert info is not None
    assert dict(info.metadata) == {"k": "v"}
