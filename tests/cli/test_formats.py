"""Collections that earlier versions of emberpc exported to Parquet files are read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from format_fixtures import FORMATS, description, names

pytest.importorskip("pyarrow")
from emberpc.cli.parquet import ParquetRecords


@pytest.mark.parametrize("name", names("collection-export"))
def test_a_collection_file_of_an_earlier_version_is_read(name: str) -> None:
    expected = description(name)["expected"]
    source = ParquetRecords(str(FORMATS / name / "export.parquet"))
    assert json.loads(json.dumps(dataclasses.asdict(source.settings))) == expected["settings"]
    assert [{**record, "vector": record["vector"].tolist()} for record in source.records()] == expected["records"]
