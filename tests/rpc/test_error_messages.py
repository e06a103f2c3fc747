"""Error messages of a server as the Python client raises them: they name the item and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from emberpc.client import Client, EmberpcError, RecordId
from examples.server_process import ServerProcess


@pytest.fixture(scope="module")
def tiny(tiny_server: ServerProcess) -> Iterator[Client]:
    with Client(tiny_server.address, timeout=300) as client:
        client.create_collection("messages", model="tiny")
        yield client
        client.delete_collection("messages")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.embed(["a", " "], model="tiny"), "texts[1] is empty; leave it out or give it some text"),
        (lambda c: c.upsert("messages", [{"id": "z"}]), "records[0].text is empty; give the record a text or a vector"),
        (
            lambda c: c.search("messages", ""),
            "queries[0].text is empty; give it some text, or search by a vector or a record id",
        ),
        (lambda c: c.search("messages", " ", mode="lexical"), "queries[0].text is empty; give it some text"),
        (
            lambda c: c.search("messages", RecordId("a"), mode="lexical"),
            "queries[0] has no text, which 'lexical' search needs; give a text, or use mode 'dense'",
        ),
        (
            lambda c: c.search("messages", RecordId("a")),
            "there is no record 'a'; upsert it, or give another record in queries[0]",
        ),
        (lambda c: c.search("messages", "a", top_k=10_001), "top_k is 10001; it must be 1 to 10000"),
        (
            lambda c: c.get_collection("missing"),
            "there is no collection 'missing'; create it, or list the collections to find the name of another",
        ),
        (
            lambda c: c.create_collection("my notes", model="tiny"),
            "name is 'my notes'; use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit",
        ),
        (
            lambda c: c.classify(["a"], classifier="tiny"),
            "model 'tiny' is for embedding, not for classification; the classification models are: 'letters'",
        ),
        (
            lambda c: c.embed(["a"], model="letters"),
            "model 'letters' is for classification, not for embedding; the embedding models are: 'other', 'tiny'",
        ),
        (
            lambda c: c.embed(["a"], model="tiny", dimensions=3),
            "dimensions is 3; model 'tiny' gives vectors of 32 dimensions, and 0 means 32; fewer dimensions need an "
            "export with --matryoshka",
        ),
        (
            lambda c: c.embed(["a"], model="tiny", dimensions=10_000),
            "dimensions is 10000; model 'tiny' gives vectors of 32 dimensions, and 0 means 32",
        ),
    ],
)
def test_a_message_names_the_item_and_the_remedy(tiny: Client, call: Callable[[Client], object], message: str) -> None:
    with pytest.raises(EmberpcError) as raised:
        call(tiny)
    assert str(raised.value) == message


def test_a_stream_of_records_names_the_remedy_for_an_empty_text(tiny: Client) -> None:
    (checkpoint,) = tiny.upsert_stream("messages", [{"id": "z"}])
    assert [str(failed.error) for failed in checkpoint.failures] == [
        "text is empty; give the record a text or a vector"
    ]
