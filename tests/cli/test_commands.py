"""Each command: its tables, its JSON output, and the places that its errors name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client.filters import parse_filter
from emberpc.v1 import index_pb2, types_pb2
from fake_server import FakeServer, Fault, vector_of

Emberpc = Any


@pytest.fixture
def books(fake: FakeServer, emberpc: Emberpc, tmp_path: Path) -> Path:
    """A collection `books` of three records, and the file with these records."""
    path = tmp_path / "books.jsonl"
    records = [
        {"id": "a", "text": "a whale hunt", "metadata": {"year": 1851, "tags": ["sea"]}, "label": "novel"},
        {"id": "b", "text": "a long\tway\nhome"},
        {"id": "c", "text": "an island"},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    assert emberpc("collection", "create", "books", "--model", "canned", "--truncation", "end").code == 0
    assert emberpc("upsert", "books", path).code == 0
    return path


def test_embed_prints_a_line_for_each_text(emberpc: Emberpc, fake: FakeServer) -> None:
    outcome = emberpc("embed", "a text", "another")
    assert (outcome.code, outcome.err) == (0, "")
    assert [row[0] for row in outcome.rows] == ["text", "a text", "another"]
    assert [float(number) for number in outcome.rows[1][1].split(" ")] == pytest.approx(vector_of("a text"))


def test_embed_prints_vectors_as_json(emberpc: Emberpc, fake: FakeServer) -> None:
    found = emberpc("embed", "é", "b", "--json", "--input-kind", "query", "--truncation", "end").objects
    assert [item["text"] for item in found] == ["é", "b"]
    assert np.array_equal(np.array(found[1]["vector"], dtype=np.float32), vector_of("b"))
    request = fake.asked["Embed"][0].request
    assert request.input_kind == types_pb2.INPUT_KIND_QUERY
    assert request.truncation == types_pb2.TRUNCATION_END


def test_embed_writes_the_vectors_of_a_file(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(20)]
    source, target = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\r\n".join(texts) + "\r\n")
    outcome = emberpc("embed", "--file", source, "-o", target, "--batch-size", 6)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"wrote 20 × 8 float32 to {target}\n"
    assert np.array_equal(np.load(target), np.stack([vector_of(text) for text in texts]))
    assert fake.asked["Embed"][0].request.priority == types_pb2.PRIORITY_BULK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_embed_refuses_a_missing_output_folder_before_it_calls_the_server(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    outcome = emberpc("embed", "a", "-o", tmp_path / "nowhere" / "out.npy")
    assert outcome.code == 2
    assert "nowhere is not there" in outcome.err
    assert not fake.asked


@pytest.mark.parametrize("command", ["embed", "count-tokens", "classify"])
def test_the_error_for_an_invalid_text_names_its_line(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, command: str
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("one\n\nthree\n")
    assert emberpc(command, "--file", source).err.startswith(f"error: {source}:2: the line is empty")
    rpc = {"embed": "Embed", "count-tokens": "CountTokens", "classify": "Classify"}[command]
    fake.faults[rpc].append(
        Fault(grpc.StatusCode.INVALID_ARGUMENT, "texts[1] has 300 tokens", "INVALID_FIELD", [("texts[1]", "too long")])
    )
    outcome = emberpc(command, "--file", "-", stdin="one\ntwo\n")
    assert (outcome.code, outcome.err) == (2, "error: stdin:2: the text has 300 tokens\n")


@pytest.mark.parametrize("arguments", [[], ["a", "--file", "-"]])
def test_texts_come_from_arguments_or_from_one_file(emberpc: Emberpc, fake: FakeServer, arguments: list[str]) -> None:
    outcome = emberpc("embed", *arguments)
    assert outcome.code == 2
    assert "give texts as arguments, or a file" in outcome.err


def test_count_tokens_prints_the_tokens_of_each_text(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("count-tokens", "one two", "three").rows == [["tokens", "text"], ["4", "one two"], ["3", "three"]]
    assert emberpc("count-tokens", "one", "--json").objects == [{"text": "one", "tokens": 3}]


def test_similarity_prints_the_score_of_each_target(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("similarity", "a", "a", "b").rows[:2] == [["score", "target"], ["1.0000", "a"]]
    assert emberpc("similarity", "a", "b", "--json").objects[0]["target"] == "b"


def test_classify_prints_labels_probabilities_and_rejections(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("classify", "what?", "outside", "-k", 1).rows[1:] == [
        ["question", "question 0.75", "what?"],
        ["(rejected)", "statement 0.75", "outside"],
    ]
    assert emberpc("classify", "outside", "-k", 1, "--details").rows == [
        ["label", "probabilities", "rejection score", "text"],
        ["(rejected)", "statement 0.75", "0.1250", "outside"],
    ]
    (found,) = emberpc("classify", "what?", "--json").objects
    assert found["classification"]["rejection_score"] == 0.75
    assert found["classification"]["labels"] == ["question"]
    assert found["classification"]["scores"][1] == {"label": "statement", "score": 0.25}


def test_collection_create_list_and_get_print_collections(emberpc: Emberpc, fake: FakeServer) -> None:
    (made,) = emberpc("collection", "create", "c", "--dimensions", 3, "--distance", "euclidean", "--json").objects
    assert (made["name"], made["dimensions"], made["distance"]) == ("c", 3, "euclidean")
    assert made["create_time"] == "2023-11-14T22:13:20.500000+00:00"
    assert emberpc("collection", "create", "d").rows[0] == ["name", "d"]
    assert [row[:3] for row in emberpc("collection", "list").rows] == [
        ["name", "records", "model"],
        ["c", "0", "(vectors only)"],
        ["d", "0", "(vectors only)"],
    ]
    assert ["create_time", "2023-11-14 22:13:20 UTC"] in emberpc("collection", "get", "c").rows
    outcome = emberpc("collection", "delete", "c")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "deleted the collection c\n")
    assert [item["name"] for item in emberpc("collection", "list", "--json").objects] == ["d"]


def test_records_printed_as_json_can_be_upserted_again(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    out = emberpc("collection", "records", "books", "--json", "--vectors", "--limit", 0).out
    assert len(out.splitlines()) == 3
    assert emberpc("collection", "create", "copy").code == 0
    outcome = emberpc("upsert", "copy", "-", "--json", stdin=out)
    assert outcome.objects == [{"inserted": 3, "updated": 0, "sequence": 1}]
    assert emberpc("collection", "records", "copy", "--json", "--vectors").out == out
    assert fake.asked["UpsertRecords"][-1].request.HasField("vectors")


def test_a_limited_list_states_how_many_records_there_are(emberpc: Emberpc, books: Path) -> None:
    outcome = emberpc("collection", "records", "books", "--limit", 2)
    assert outcome.rows == [["id", "label", "text"], ["a", "novel", "a whale hunt"], ["b", "", "a long way home"]]
    assert outcome.err == "2 of 3 records; --limit 0 lists all\n"


def test_upsert_prints_counts_of_inserted_and_updated_records(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    assert emberpc("upsert", "books", books).rows == [["inserted", "0"], ["updated", "3"], ["sequence", "2"]]
    outcome = emberpc("upsert", "books", "-", stdin="")
    assert (outcome.code, outcome.err) == (0, "stdin holds no records\n")


def test_upsert_reads_a_table(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('\ufeffid,text,label,metadata,price\nx,"two\nlines",l,"{""n"": 1}",3.50\n', encoding="utf-8")
    emberpc("collection", "create", "c")
    assert emberpc("upsert", "c", table).code == 0
    (found,) = emberpc("get", "c", "x", "--json").objects
    assert (found["text"], found["label"]) == ("two\nlines", "l")
    assert found["metadata"] == {"n": 1, "price": "3.50"}


def test_the_error_for_an_invalid_record_names_its_line(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    emberpc("collection", "create", "c")
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t"}\n\n{"id": "b", "text": "t"}\n{"id": "c", "text": 7}\n')
    outcome = emberpc("upsert", "c", path, "--batch-size", 2)
    assert outcome.code == 2
    written = "the first 2 records of this call are written already"
    assert outcome.err == f"error: {path}:4: text is of type int; it must be a str; {written}\n"
    assert emberpc("collection", "get", "c", "--json").objects[0]["record_count"] == 2
    fault = Fault(
        grpc.StatusCode.INVALID_ARGUMENT,
        "records[1].text is empty",
        "INVALID_FIELD",
        [("records[1].text", "is empty")],
    )
    fake.faults["UpsertRecords"].append(fault)
    path.write_text('{"id": "a", "text": "t"}\n\n{"id": "b"}\n')
    outcome = emberpc("upsert", "c", path)
    assert (outcome.code, outcome.err) == (2, f"error: {path}:3: text is empty\n")


def test_get_prints_records_and_exits_with_4_for_missing_ids(emberpc: Emberpc, books: Path) -> None:
    outcome = emberpc("get", "books", "b", "a")
    assert outcome.code == 0
    assert outcome.rows[0] == ["id", "b"]
    assert [""] in outcome.rows
    assert ["metadata", "tags ['sea'], year 1851"] in outcome.rows or [
        "metadata",
        "year 1851, tags ['sea']",
    ] in outcome.rows
    outcome = emberpc("get", "books", "a", "zz", "--json")
    assert outcome.code == 4
    assert outcome.err == "error: there is no record 'zz' in 'books'\n"
    assert [item["id"] for item in outcome.objects] == ["a"]


def test_delete_prints_the_count_of_deleted_records(emberpc: Emberpc, books: Path) -> None:
    assert emberpc("delete", "books", "a", "zz", "--json").objects == [{"deleted": 1}]
    assert emberpc("delete", "books", "a").rows == [["deleted", "0"]]


def test_search_prints_hits(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    outcome = emberpc("search", "books", "an island", "-k", 2, "--ef", 30)
    assert outcome.rows[:2] == [["score", "id", "label", "text"], ["1.0000", "c", "", "an island"]]
    assert outcome.err == ""
    assert fake.asked["Search"][0].request.ef == 30
    outcome = emberpc("search", "books", "--id", "c", "--json")
    assert {item["id"] for item in outcome.objects} == {"a", "b"}
    assert outcome.err == "2 hits: the collection has 3 records\n"


def test_search_sends_min_recall_and_refuses_values_above_1(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    assert emberpc("search", "books", "an island", "--min-recall", 0.9).code == 0
    assert fake.asked["Search"][-1].request.min_recall == 0.9
    assert emberpc("search", "books", "an island", "--min-recall", 1.5).code == 2


def test_collection_verify_prints_problems_and_exits_with_7(emberpc: Emberpc, books: Path, tmp_path: Path) -> None:
    outcome = emberpc("collection", "verify", "books")
    assert (outcome.code, outcome.rows) == (0, [["records", "3"], ["problems", "0"]])
    lost = tmp_path / "lost.jsonl"
    lost.write_text('{"id": "lost", "text": "x"}\n')
    emberpc("upsert", "books", lost)
    outcome = emberpc("collection", "verify", "books")
    assert outcome.code == 7
    assert outcome.rows[1] == ["lost", "UNREACHABLE", "record 'lost' is out of reach"]
    assert "1 problem in 4 records" in outcome.err
    assert emberpc("collection", "verify", "books", "--json").objects[0]["checked"] == 4
    assert emberpc("collection", "verify", "none").code == 4


@pytest.mark.parametrize("arguments", [[], ["query", "--id", "a"]])
def test_search_needs_either_a_query_or_an_id(emberpc: Emberpc, fake: FakeServer, arguments: list[str]) -> None:
    assert emberpc("search", "books", *arguments).code == 2


def test_models_prints_models_and_classifiers(emberpc: Emberpc, fake: FakeServer) -> None:
    assert [row[0] for row in emberpc("models").rows] == ["name", "canned", "kinds"]
    assert ["labels", "question, statement"] in emberpc("models", "kinds").rows
    (quality,) = [row for row in emberpc("models", "canned").rows if row[0] == "quality"]
    assert quality == ["quality", "ece 0.0123456, parity.cosine_min 0.9999998"]
    assert [row[0] for row in emberpc("models", "classifiers").rows] == ["name", "kinds"]
    assert ["labels", "question: asks, statement"] in emberpc("models", "classifiers", "kinds").rows
    assert [item["kind"] for item in emberpc("models", "classifiers", "--json").objects] == ["fine_tuned"]
    assert [item["variant"] for item in emberpc("models", "--json").objects] == ["fp32", "qint8_avx2"]


def test_health_prints_the_status_and_sets_the_exit_code(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("health").rows == [["status", "SERVING"]]
    fake.health.set("", 2)
    outcome = emberpc("health", "--json")
    assert (outcome.code, outcome.objects) == (3, [{"status": "NOT_SERVING"}])


def test_connection_options_override_the_environment(
    emberpc: Emberpc, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fake.target
    monkeypatch.setenv("EMBERPC_TARGET", "127.0.0.1:1")
    monkeypatch.setenv("EMBERPC_TOKEN", "from-environment")
    assert emberpc("models", "--target", target, "--timeout", 100).code == 0
    assert emberpc("models", "--target", target, "--token", "from-option").code == 0
    first, second = fake.asked["ListModels"]
    assert first.metadata["authorization"] == "Bearer from-environment"
    assert second.metadata["authorization"] == "Bearer from-option"
    assert first.seconds_left > 90


def test_a_token_without_tls_is_refused_for_a_remote_host(emberpc: Emberpc) -> None:
    outcome = emberpc("models", "--target", "embeddings.example:1", "--token", "secret")
    assert outcome.code == 2
    assert "plain text; give --tls-ca FILE" in outcome.err
    assert "secret" not in outcome.err


@pytest.mark.parametrize("target", ["http://localhost:50051", "HTTPS://host"])
def test_a_url_as_the_target_is_refused_with_the_options_to_use(emberpc: Emberpc, target: str) -> None:
    outcome = emberpc("models", "--target", target)
    assert (outcome.code, outcome.err) == (
        2,
        f"error: --target is {target!r}; give HOST:PORT alone, and --tls-ca FILE for an encrypted connection\n",
    )


def test_a_missing_certificate_is_an_input_error(emberpc: Emberpc, tmp_path: Path) -> None:
    outcome = emberpc("models", "--tls-ca", tmp_path / "ca.pem")
    assert outcome.code == 2
    assert "ca.pem cannot be read: No such file" in outcome.err


def test_config_prints_each_setting_with_its_source(
    emberpc: Emberpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "emberpc.toml"
    path.write_text("workers = 2\nbatch_tokens = 256\n")
    monkeypatch.setenv("EMBERPC_BATCH_TOKENS", "128")
    arguments = ["config", "--config", path, "--model", "a=x", "--model", "b=y", "--drain-seconds", "5"]
    found = {item["setting"]: (item["value"], item["source"]) for item in emberpc(*arguments, "--json").objects}
    assert found["workers"] == (2, f"file {path}")
    assert found["batch_tokens"] == (128, "environment EMBERPC_BATCH_TOKENS")
    assert found["model"] == (["a=x", "b=y"], "flag")
    assert found["drain_seconds"] == (5.0, "flag")
    assert found["log_level"] == ("info", "default")
    assert ["model", "a=x, b=y", "flag"] in emberpc(*arguments).rows


def test_config_prints_the_source_of_a_secret_and_not_its_value(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ["milvus_token", "", "default"] in emberpc("config").rows
    monkeypatch.setenv("EMBERPC_MILVUS_TOKEN", "root:hunter2")
    for arguments in (["config"], ["config", "--json"]):
        outcome = emberpc(*arguments)
        assert "hunter2" not in outcome.out + outcome.err
        assert "environment EMBERPC_MILVUS_TOKEN" in outcome.out


def test_serve_and_config_take_every_setting_but_secrets_as_a_flag(emberpc: Emberpc) -> None:
    import dataclasses

    from emberpc.server.settings import Settings

    for command in ("serve", "config"):
        text = emberpc(command, "--help").out
        for field in dataclasses.fields(Settings):
            assert (f"--{field.name.replace('_', '-')}" in text) is not field.metadata["secret"]


@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_wrong_setting_is_an_input_error(emberpc: Emberpc, command: str) -> None:
    outcome = emberpc(command, "--listen", "nowhere")
    assert (outcome.code, outcome.err) == (
        2,
        "error: listen is 'nowhere'; it must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051\n",
    )


def test_models_are_loaded_reloaded_and_unloaded(emberpc: Emberpc, fake: FakeServer) -> None:
    outcome = emberpc("models", "load", "m", "canned", "--variant", "int8")
    assert (outcome.code, outcome.err) == (0, "warming up …\n")
    assert ["name", "m"] in outcome.rows
    request = fake.asked["LoadModel"][0].request
    assert (request.name, request.path, request.variant) == ("m", "canned", "int8")
    assert emberpc("models", "reload", "m", "--json").objects[0]["state"] == "ready"
    assert fake.asked["ReloadModel"][0].request.path == ""
    outcome = emberpc("models", "unload", "m")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "unloaded the model m\n")
    fake.faults["LoadModel"].append(Fault(grpc.StatusCode.PERMISSION_DENIED, "not here", "MODEL_ADMIN_OFF"))
    assert emberpc("models", "load", "m", "canned").code == 6
    assert emberpc("models", "show", "kinds", "--json").objects[0]["name"] == "kinds"


def test_commands_send_the_filter_of_the_option_where(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    text = 'lang = "en" and year >= 2020'
    for arguments, rpc in (
        (("search", "books", "an island"), "Search"),
        (("collection", "records", "books"), "ListRecords"),
        (("collection", "count", "books"), "CountRecords"),
        (("delete", "books"), "DeleteRecords"),
    ):
        assert emberpc(*arguments, "--where", text).code == 0
        assert fake.asked[rpc][-1].request.filter == parse_filter(text)
    assert emberpc("collection", "count", "books", "--json").objects == [{"count": 3}]


def test_search_sends_mode_weight_and_fusion_of_a_hybrid_search(emberpc: Emberpc, fake: FakeServer) -> None:
    emberpc("collection", "create", "books", "--model", "canned")
    assert emberpc("search", "books", "an island", "--mode", "hybrid", "--dense-weight", 0.25).code == 0
    assert emberpc("search", "books", "an island", "--mode", "hybrid", "--fusion", "ranks").code == 0
    plain, by_rank = (each.request for each in fake.asked["Search"])
    assert (plain.mode, plain.dense_weight) == (index_pb2.SEARCH_MODE_HYBRID, 0.25)
    assert by_rank.fusion == index_pb2.SEARCH_FUSION_RANKS


def test_the_error_for_an_invalid_filter_names_its_column(emberpc: Emberpc, books: Path) -> None:
    outcome = emberpc("delete", "books", "--where", "lang = en")
    assert outcome.code == 2
    assert "where, column 8: expected a value" in outcome.err
    for arguments in ([], ["a", "--where", "lang exists"]):
        assert emberpc("delete", "books", *arguments).code == 2


def test_upsert_converts_columns_to_the_types_of_the_option_types(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    emberpc("collection", "create", "c")
    path = tmp_path / "r.csv"
    path.write_text("id,text,year,code\na,words,2001,00123\n")
    assert emberpc("upsert", "c", path, "--types", "year=int").code == 0
    assert emberpc("get", "c", "a", "--json").objects[0]["metadata"] == {"year": 2001, "code": "00123"}
    other = tmp_path / "r.jsonl"
    other.write_text('{"id": "a"}\n')
    for command in (
        ("upsert", "c", other),
        ("collection", "import", "c", other),
        ("collection", "import", "c", tmp_path),
    ):
        outcome = emberpc(*command, "--types", "year=int")
        assert (outcome.code, outcome.out) == (2, "")
        assert "--types is for tables (.csv, .tsv), and " in outcome.err


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.CSV", "texts.tsv", "texts.parquet"])
@pytest.mark.parametrize("command", [("embed",), ("embed", "--stream", "--json"), ("count-tokens",), ("classify",)])
def test_files_of_records_are_refused_as_files_of_texts(
    fake: FakeServer, emberpc: Emberpc, tmp_path: Path, name: str, command: tuple[str, ...]
) -> None:
    file = tmp_path / name
    file.write_text('{"id": "a", "text": "b"}\n')
    outcome = emberpc(*command, "--file", file)
    assert outcome.code == 2
    assert "reads one text from each line" in outcome.err
