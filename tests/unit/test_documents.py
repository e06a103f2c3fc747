"""Documents agree with the code: settings, RPCs, links, modules, test selections and commands."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from emberpc.client import Client
from emberpc.server.app import SERVICE_NAMES
from emberpc.server.settings import Settings
from emberpc.v1 import classification_pb2, embedding_pb2, index_pb2, model_pb2, server_pb2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_setting_is_documented_with_its_default_and_its_help() -> None:
    table = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Settings):
        assert isinstance(field.default, (tuple, int, float, str, Path, type(None)))
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = f"`{shown}`" if field.default not in ((), "", None) else "–"
        flag = "–" if field.metadata["secret"] else f"`--{field.name.replace('_', '-')}`"
        line = f"| {flag} | `EMBERPC_{field.name.upper()}` | {default} | {field.metadata['help']} |"
        assert line in table


def test_every_rpc_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {
        "UpsertRecordsStream", "ReembedCollection", "CancelReembedding", "VerifyCollection",
        "BackupCollection", "RestoreCollection", "FindDuplicates", "ClusterRecords",
        "CreateClassifier", "UpdateClassifier", "DeleteClassifier", "FitClassifier", "SubmitCorrections",
    }  # fmt: skip
    for module in (embedding_pb2, index_pb2, classification_pb2, model_pb2, server_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            assert service.full_name in SERVICE_NAMES
            for method in service.methods:
                assert method.name in named or f"`{method.name}`" in text


def test_every_method_of_the_client_is_documented_once() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| task | methods of `Client` |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert sorted(documented) == sorted(name for name in dir(Client) if not name.startswith("_"))


def test_the_namespace_has_no_init_file() -> None:
    """With an __init__.py, an editable install would not find the packages of the other folders."""
    assert list(ROOT.glob("*/emberpc/__init__.py")) == []
    assert len(list(ROOT.glob("*/emberpc"))) == 4


def test_no_module_has_more_than_420_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("protos", "server", "client", "export", "tests", "tools", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if "_pb2" not in path.name and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert long == {}


def test_every_link_between_documents_has_a_target() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = []
    for document in documents:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            if not (document.parent / link).exists():
                broken.append(f"{document.name}: {link}")
    assert broken == []


#: Files of the decision records, without their appendices.
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


@pytest.mark.parametrize("record", DECISIONS, ids=[record.stem for record in DECISIONS])
def test_a_decision_record_has_four_parts_on_one_page(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    parts = re.findall(r"^(?:\*\*|#{2,} )([^.*\n]+)", text, flags=re.MULTILINE)
    assert parts == ["Context", "Decision", "Consequences", "Alternatives considered"]
    assert len(text.split()) <= 600, "Move measurements and details to an appendix in docs/decisions/measurements/"


#: Folders that paths in documents are relative to: the repository and its packages.
ROOTS = (".", "protos/emberpc", "client/emberpc", "client/emberpc/client", "server/emberpc/server", "export/emberpc")


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_module_named_in_a_document_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"[\w./-]+\.py\b|(?<=`)[\w-]+(?:/[\w.-]+)*/?(?=`)", prose)
    paths = {name for name in named if re.search(r"/|\.py$", name) and not name.startswith(".")}
    assert len(paths) > 10
    assert {path for path in paths if not any((ROOT / root / path).exists() for root in ROOTS)} == set()


def test_the_matrix_runs_the_tests_of_the_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (server,) = re.findall(r"^SERVER_TESTS = (.*)$", makefile, re.M)
    targets = dict(re.findall(r"^\t\.venv-(client|server)/bin/python -m pytest (.*?) \$\(PARALLEL\)$", makefile, re.M))
    matrix = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for selection in targets.values():
        paths, marks = re.fullmatch(r'(.*) -m "(.*)"', selection.replace("$(SERVER_TESTS)", server)).groups()  # type: ignore[union-attr]
        assert f'"{paths}"' in matrix
        assert f'"{marks}"' in matrix
    assert sorted(targets) == ["client", "server"]


def packages_of(extra: str) -> set[str]:
    """Return the names of the packages that an extra installs, including those of the extras in it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found: set[str] = set()
    for requirement in extras[extra]:
        if included := re.fullmatch(r"emberpc\[(.*)\]", requirement):
            found.update(*map(packages_of, included[1].split(",")))
        else:
            found.add(re.split(r"[\[><=;]", requirement)[0])
    return found


def test_the_base_install_needs_only_packages_of_the_client() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[><=]", each)[0] for each in project["dependencies"]} == {"grpcio", "protobuf", "numpy"}


@pytest.mark.parametrize("extra", ["cli", "server", "milvus", "export"])
def test_only_the_export_needs_torch_and_only_the_embedded_index_needs_hnswlib(extra: str) -> None:
    packages = packages_of(extra)
    assert ("torch" in packages) is (extra == "export")
    assert ("hnswlib" in packages) is (extra in ("server", "export"))


def test_every_command_and_exit_code_is_documented() -> None:
    from emberpc.cli.app import program

    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in program().commands.items():
        for sub in getattr(command, "commands", {"": None}):
            assert f"emberpc {name}" in text
            assert f" {sub}" in text or f"`{sub}`" in text
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130):
        assert f"| {code} |" in text
