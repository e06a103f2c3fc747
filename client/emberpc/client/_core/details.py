"""Call the caller's `details` function with a `ResponseDetails`: what a response states beside its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message

from emberpc.client._core.enums import DURABILITIES, word_of
from emberpc.client.details import Details, ModelVersion, ResponseDetails, Timings, TokenUsage
from emberpc.v1 import types_pb2


def report(details: Details | None, response: Message, first: int = 0, count: int = 1) -> None:
    """Call `details` with the `ResponseDetails` of a response.

    Args:
        details: the caller's function; None: do nothing.
        response: the response. A value of `ResponseDetails` that the response does not state keeps its default.
        first: index of the request's first item in the caller's list.
        count: number of items of the request; 1 for `similarity` and for `delete` with a filter.
    """
    if details is None:
        return
    fields: dict[str, Any] = {name: getattr(response, name) for name in response.DESCRIPTOR.fields_by_name}
    present = {field.name for field, _ in response.ListFields()}
    receipt = fields.get("receipt")
    details(
        ResponseDetails(
            first=first,
            count=count,
            model=model_version(fields["model"]) if "model" in present else None,
            timings=_timings(fields["timings"]) if "timings" in present else None,
            usages=tuple(_usages(response)),
            max_tokens=fields.get("max_tokens", 0),
            missing_ids=tuple(fields.get("missing_ids", ())),
            sequence=receipt.sequence if receipt else 0,
            durability=word_of(receipt.durability, DURABILITIES) if receipt else "unknown",
        )
    )


def _usages(response: Message) -> Iterator[TokenUsage]:
    """Yield the token usages that a response states, in the order of the texts in the request.

    Responses of `Search` and `Classify` state the usage in each result, others in a field `usages`. Nothing is yielded
    for a response without these fields. For a `Search`, one usage is yielded for each query, with 0 tokens for a query
    that was not embedded; nothing is yielded if no query was embedded.
    """
    fields = response.DESCRIPTOR.fields_by_name
    name = next((name for name in ("usages", "results", "classifications") if name in fields), "")
    items = getattr(response, name) if name else ()
    if name == "results" and not any(item.HasField("usage") for item in items):
        return
    for item in items:
        usage = item if name == "usages" else item.usage
        yield TokenUsage(usage.tokens, usage.truncated)


def model_version(message: types_pb2.ModelVersion) -> ModelVersion:
    """Convert the message of a model version to the client's type."""
    return ModelVersion(message.name, message.revision, message.fingerprint, message.classifier_fingerprint)


def _timings(message: types_pb2.Timings) -> Timings:
    return Timings(message.tokenize_seconds, message.queue_seconds, message.infer_seconds, message.lookup_seconds)
