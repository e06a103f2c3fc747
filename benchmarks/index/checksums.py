"""Measure how many searches per second the checksums of records cost, through gRPC, in alternating rounds of one run.

Two servers hold collections with the same records. The first server checks each record that it reads from SQLite for
damage. The second server does not. Without vectors, it does not even select the columns of the checksums. A search
returns hits with their texts and metadata. There are three cases: the default record cache, which holds all records; a
cache of one byte, so that every hit is read from SQLite; and hits with their vectors, which no cache holds.

Run with `--unchecked`, this script is the second server; the other arguments are those of `emberpc`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.load import capacity, cpu_seconds, host, middle
from emberpc.cli.main import main as cli
from emberpc.client import Client, Record
from emberpc.export.data.stdlib_texts import read_stdlib
from emberpc.server.collections.types import CollectionSpec, StoredRecord
from emberpc.server.index.storage import damage, store_reader
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import vectors as wire
from examples.server_process import ServerProcess

SEARCH = "/emberpc.v1.IndexService/Search"
COLLECTION, DIMENSIONS = "c", 384
CALLERS, CALLS = 4, 300
#: SQL that selects the records of a JSON list of labels (the numbers of records) as one JSON value, without checksums.
_UNCHECKED = """
SELECT json_group_array(json_array(label, id, text, metadata, class_label, revision, created, updated, expires))
FROM records WHERE label IN (SELECT value FROM json_each(?))
"""
_ALL_PARTS = [pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA, pb.RECORD_PART_VECTOR]
#: The measured cases by name: further flags of both servers, and fields of the search requests.
CASES: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "10 hits from the cache": ((), {"top_k": 10}),
    "10 hits from SQLite": (("--record-cache-bytes", "1"), {"top_k": 10}),
    "100 hits with vectors, always from SQLite": ((), {"top_k": 100, "parts": _ALL_PARTS}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds for each cache")
    arguments = parser.parse_args()
    found = {name: _measure(*case, arguments.rounds) for name, case in CASES.items()}
    print(json.dumps({"host": host(), "checked / unchecked": found}, indent=2))


def _measure(flags: Sequence[str], fields: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Measure both servers in alternating rounds.

    Args:
        flags: further flags of both servers.
        fields: fields of the search requests.
        rounds: number of rounds that count.

    Returns:
        For searches per second and for the server's CPU milliseconds of a search: the median of each server, and the
        median and the lower and upper quartile of the rounds' ratios (checked divided by unchecked).
    """
    programs = {"checked": ("-m", "emberpc.cli.main"), "unchecked": ("-m", __spec__.name, "--unchecked")}
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    with ExitStack() as stack:
        servers = {}
        for name, program in programs.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers[name] = stack.enter_context(ServerProcess({}, folder, *flags, program=program))
            requests = _fill(servers[name].address, fields)
        # The first round does not count: its searches fill the caches.
        for number in range(rounds + 1):
            for name in sorted(servers, reverse=bool(number % 2)):
                figures[name].append(_round(servers[name], requests))
    checked, unchecked = (np.array(figures[name][1:]) for name in programs)
    report: dict[str, Any] = {}
    for column, label in enumerate(("searches per second", "server's CPU-ms per search")):
        ratios = checked[:, column] / unchecked[:, column]
        report[label] = {
            "checked": middle(checked[:, column].tolist()),
            "unchecked": middle(unchecked[:, column].tolist()),
            "ratio": middle(ratios.tolist()),
            "quartiles": [round(float(each), 3) for each in np.quantile(ratios, (0.25, 0.75))],
        }
    return report


def _fill(address: str, fields: Mapping[str, Any]) -> Sequence[pb.SearchRequest]:
    """Create a collection of at most 5,000 docstrings with clustered vectors; return a request for each of 4 callers.

    Args:
        address: address of the server, as host:port.
        fields: fields of the requests besides collection and query.
    """
    generator = np.random.default_rng(0)
    texts = [doc.text for doc in read_stdlib()][:5000]
    centres = generator.standard_normal((250, DIMENSIONS))
    vectors = centres[generator.integers(0, 250, len(texts))] + 0.5 * generator.standard_normal(
        (len(texts), DIMENSIONS)
    )
    with Client(address, timeout=300) as client:
        client.create_collection(COLLECTION, dimensions=DIMENSIONS)
        for start in range(0, len(texts), 250):
            client.upsert(
                COLLECTION,
                [
                    Record(f"r{i}", texts[i], {"place": i, "source": "stdlib"}, vector=vectors[i].astype(np.float32))
                    for i in range(start, min(start + 250, len(texts)))
                ],
            )
    queries = vectors[:CALLERS] + 0.3 * generator.standard_normal((CALLERS, DIMENSIONS))
    wanted = [pb.SearchQuery(vector=wire.encode(query[None].astype(np.float32))) for query in queries]
    return [pb.SearchRequest(collection=COLLECTION, queries=[query], **fields) for query in wanted]


def _round(server: ServerProcess, requests: Sequence[pb.SearchRequest]) -> tuple[float, float]:
    """Send each request 300 times, one call after the other; each request has a caller, and the callers run together.

    Returns:
        Searches per second, and the server's CPU milliseconds of a search.
    """
    before = cpu_seconds(server.process.pid)
    seconds = capacity(server.address, SEARCH, requests, CALLS)
    count = CALLS * len(requests)
    return count / seconds, 1000 * (cpu_seconds(server.process.pid) - before) / count


def _unchecked_records(document: str) -> dict[int, StoredRecord]:
    """Convert the JSON value that `_UNCHECKED` selects to records by label, without a check for damage."""
    return {row[0]: _record(*row[1:]) for row in json.loads(document)}


def _unchecked_record(row: Sequence[Any], spec: CollectionSpec, *, with_vectors: bool) -> StoredRecord:
    """Convert a row to a record as `rows.record_of` does, but without a check for damage."""
    vector = np.frombuffer(row[12], dtype="<f4") if with_vectors else None
    record_id, text, metadata, label, revision, created, updated, expires = row[1:9]
    expiry = None if expires is None else expires / 1e6
    return _record(record_id, text, metadata, label, revision, created / 1e6, updated / 1e6, expiry, vector)


def _record(
    record_id: str,
    text: str,
    metadata: str,
    label: str,
    revision: int,
    created: float,
    updated: float,
    expires: float | None,
    vector: np.ndarray | None = None,
) -> StoredRecord:
    """Return a record with these values: `metadata` as JSON, `label` the class, and times in seconds since 1970."""
    return StoredRecord(
        record_id,
        text,
        metadata,
        label,
        revision,
        datetime.fromtimestamp(created, timezone.utc),
        datetime.fromtimestamp(updated, timezone.utc),
        vector,
        None if expires is None else datetime.fromtimestamp(expires, timezone.utc),
    )


def serve_unchecked(arguments: Sequence[str]) -> None:
    """Run `emberpc` with these arguments and with readers of records that do not check for damage; exit the process.

    Raises:
        RuntimeError: the server no longer has a function or constant that this benchmark replaces.
    """
    replaced = (
        (store_reader, "AS_ONE_ROW", _UNCHECKED),
        (store_reader, "records_of_one_row", _unchecked_records),
        (damage, "record_of", _unchecked_record),
    )
    for module, name, value in replaced:
        if not hasattr(module, name):
            raise RuntimeError(f"{module.__name__} has no {name}; this benchmark must be changed with the server")
        setattr(module, name, value)
    sys.exit(cli(arguments))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--unchecked"]:
        serve_unchecked(sys.argv[2:])
    else:
        main()
