"""Embeddings over gRPC: vectors do not depend on the other texts of a call, and element types and usages are right.

tests/export/test_embedding.py compares served vectors with those of sentence-transformers.
"""

from __future__ import annotations

import csv
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.bundle import read_bundle
from emberpc.client import Client
from emberpc.export.data.stdlib_texts import read_stdlib
from emberpc.server.engine.models.model import Model
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc, types_pb2
from emberpc.wire import vectors
from examples.server_process import ServerProcess

TEXTS = 50


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real texts, from a few words to more tokens than the model takes, in mixed order."""
    docs = [doc.text for doc in read_stdlib()]
    chosen = random.Random(0).sample(docs, TEXTS - 12)
    long = [" ".join(docs[i : i + 12]) for i in range(0, 48, 12)]
    short = [text.split("\n")[0][:12].strip() or "x" for text in docs[:8]]
    mixed = chosen + long + short
    random.Random(1).shuffle(mixed)
    return mixed


@pytest.fixture(scope="session")
def expected(server: ServerProcess, texts: list[str]) -> np.ndarray:
    """The vectors of `texts` by one call."""
    with Client(server.address) as client:
        return client.embed(texts, model="minilm", truncation="end")


def cosines(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    found: np.ndarray = (got * expected).sum(axis=1) / norms
    return found


def test_order_and_batches_of_texts_do_not_change_vectors(
    client: Client, texts: list[str], expected: np.ndarray
) -> None:
    order = list(range(TEXTS))
    random.Random(2).shuffle(order)
    shuffled = client.embed([texts[i] for i in order], model="minilm", truncation="end", batch_size=7)
    assert cosines(shuffled, expected[order]).min() >= 0.9999
    alone = np.vstack([client.embed([texts[i]], model="minilm", truncation="end") for i in order[:20]])
    assert cosines(alone, expected[order[:20]]).min() >= 0.9999


def test_concurrent_calls_each_get_their_own_vectors(client: Client, texts: list[str], expected: np.ndarray) -> None:
    spans = [range(start, min(start + 1 + start % 5, TEXTS)) for start in range(0, TEXTS, 3)]

    def embed(span: range) -> np.ndarray:
        return client.embed([texts[i] for i in span], model="minilm", truncation="end")

    with ThreadPoolExecutor(16) as pool:
        for span, got in zip(spans, pool.map(embed, spans), strict=True):
            assert cosines(got, expected[list(span)]).min() >= 0.9999


def test_a_text_of_a_megabyte_does_not_delay_other_calls(server: ServerProcess) -> None:
    huge = "It was the best of times, it was the worst of times. " * 20_000
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        slow = [
            stub.CountTokens.future(embedding_pb2.CountTokensRequest(model="minilm", texts=[huge])) for _ in range(2)
        ]
        small = [stub.Embed(embedding_pb2.EmbedRequest(model="minilm", texts=["short"])) for _ in range(3)]
        # The short calls were sent later and are answered, no matter whether the long ones still run.
        assert all(response.embeddings.rows == 1 for response in small)
        assert all(call.result().token_counts[0] > 250_000 for call in slow)


def test_usages_state_tokens_and_truncation(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        response = embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(
            embedding_pb2.EmbedRequest(
                model="minilm", texts=["hello world", "word " * 500], truncation=types_pb2.TRUNCATION_END
            )
        )
    assert [(usage.tokens, usage.truncated) for usage in response.usages] == [(4, False), (256, True)]
    assert response.model.name == "minilm"
    assert len(response.model.fingerprint) == 64
    assert response.timings.infer_seconds > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("int8", 2e-3)])
def test_other_element_types_give_nearly_equal_vectors(
    client: Client, dtype: Literal["float32", "float16", "int8"], tolerance: float
) -> None:
    exact = client.embed(["a text", "another"], model="minilm")
    assert np.abs(client.embed(["a text", "another"], model="minilm", dtype=dtype) - exact).max() <= tolerance


def test_binary_vectors_have_the_signs_of_the_components(client: Client) -> None:
    exact = client.embed(["a text"], model="minilm")
    binary = client.embed(["a text"], model="minilm", dtype="binary")
    assert np.array_equal(binary, np.where(exact > 0, 1, -1))


def test_similarity_is_the_cosine_of_the_vectors(client: Client) -> None:
    sources, targets = ["a cat", "a car"], ["a kitten", "a truck", "a cat"]
    scores = client.similarity(sources, targets, model="minilm")
    left, right = client.embed(sources, model="minilm"), client.embed(targets, model="minilm")
    assert scores.shape == (2, 3)
    assert np.abs(scores - left @ right.T).max() < 1e-5
    assert scores[0].argmax() == 2
    assert scores[0][0] > scores[0][1]


def test_count_tokens_has_no_token_limit(client: Client) -> None:
    assert client.count_tokens(["", "hello world", "word " * 500], model="minilm") == [2, 4, 502]


def test_vectors_reach_the_expected_correlation_on_the_sts_benchmark(client: Client) -> None:
    """Spearman's rank correlation on the STS benchmark's test pairs; EMBERPC_TEST_DATA is the folder of data sets."""
    folder = os.environ.get("EMBERPC_TEST_DATA", "")
    path = Path(folder) / "stsbenchmark" / "test.csv"
    if not folder or not path.exists():
        pytest.skip("set EMBERPC_TEST_DATA to a folder with stsbenchmark/test.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    left = client.embed([row["sentence1"] for row in rows], model="minilm")
    right = client.embed([row["sentence2"] for row in rows], model="minilm")
    assert len(rows) == 1379
    assert spearman((left * right).sum(axis=1), np.array([float(row["score"]) for row in rows])) >= 0.815


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Return Pearson's correlation of the ranks; equal values share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


@given(
    matrix=st.integers(1, 5).flatmap(
        lambda rows: st.lists(
            st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6), min_size=rows, max_size=rows
        )
    )
)
def test_vectors_are_equal_after_encoding_and_decoding(matrix: list[list[float]]) -> None:
    array = np.array(matrix, dtype=np.float32)
    assert np.array_equal(vectors.decode(vectors.encode(array)), array)
    int8 = vectors.decode(vectors.encode(array, types_pb2.DATA_TYPE_INT8))
    assert np.abs(int8 - array).max() <= np.abs(array).max() / 127 / 2 * 1.01 + 1e-6
    binary = vectors.decode(vectors.encode(array, types_pb2.DATA_TYPE_BINARY))
    assert np.array_equal(binary, np.where(array > 0, 1, -1))


def test_a_model_can_be_loaded_without_a_server(minilm_bundle: Path) -> None:
    model = Model.load("m", minilm_bundle)
    assert model.manifest.dimensions == 384
    assert model.fingerprint == read_bundle(minilm_bundle).fingerprint("fp32")
