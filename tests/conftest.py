"""Fixtures with exported bundles and with servers that serve them, and the settings of all tests."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# As in `emberpc.server`, which the tests import after the client. Otherwise the fork handlers of gRPC start threads in
# the child process that writes a snapshot, and the child closes their files; a test then found an empty snapshot.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# PyTorch and numpy in the test processes compute with one thread, and the threads of OpenMP wait without spinning: with
# as many test processes as cores, threads that spin cost more CPU time than the work. ONNX Runtime keeps its threads.
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from emberpc.client import AsyncClient, Client
from examples.server_process import ServerProcess

pytest_plugins = ["fixtures_bundles"]

# Calls without a timeout of their own have ten times the default of users, so that no test fails on a slow host.
for kind in (Client, AsyncClient):
    assert kind.__init__.__kwdefaults__ is not None
    kind.__init__.__kwdefaults__["timeout"] = 300.0
# A fifth of the default number of examples of Hypothesis; `make test-all` uses the thorough profile.
settings.register_profile("emberpc", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20)
settings.register_profile("thorough", settings.get_profile("emberpc"), max_examples=400)
settings.load_profile("emberpc")

#: Timeout of a slow test in seconds; `timeout` in pyproject.toml is that of the others.
SLOW_TIMEOUT = 3600


#: Tests with one of these fixtures need PyTorch and get the marker `export`.
EXPORTED = {
    *("minilm_bundle", "classifier_bundle", "training_file", "tiny_source", "make_source", "short_minilm_source"),
}


#: Folder of the temporary files of tests, if it has at least this many free bytes.
MEMORY_FILES, MEMORY_FILES_BYTES = Path("/dev/shm"), 4 * 2**30


#: Groups of files; one test process runs all files of a group. The largest group that is left goes to the next free
#: process. A process that ran "PyTorch" has 1.7 GB, and the tests of the index make 330 processes with `fork`, which
#: takes 25 ms of CPU time for each 300 MB of the parent. The files of "servers" share `server` and `tiny_server`.
#: A file that is missing here only costs CPU time.
TOGETHER = {
    "index": ("tests/index/",),
    "PyTorch": (
        "tests/export/",
        *(f"tests/cli/test_{name}.py" for name in ("bad_input", "bundles", "compare", "early_checks", "finetune")),
        *("tests/engine/test_model.py", "tests/unit/test_bundle_cache.py"),
    ),
    "servers": (
        *(
            f"tests/rpc/test_{name}.py"
            for name in (
                *("backup", "classification", "classifiers", "collections", "embedding", "error_messages", "errors"),
                *("filters", "groups", "lifecycle", "limits", "malformed", "readme", "rejection", "truncation"),
            )
        ),
        *(
            f"tests/cli/test_{name}.py"
            for name in ("details", "import_export", "map", "queries", "revisions", "vector_check")
        ),
    ),
}


#: Number of imported modules when `gc.freeze` was called last.
_frozen_modules: dict[str, int] = {}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """With two processes and `--dist loadfile`: give each group of files to one process, and each other file to the
    next free process. With more processes, a group would take longer than the rest of the tests.
    """
    if (config.getoption("dist"), config.getoption("numprocesses")) != ("loadfile", 2):
        return None

    class GroupScheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((group for group, files in TOGETHER.items() if file.startswith(files)), file)

    return GroupScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the temporary files of the fast tests in memory, or in the folder of PYTEST_DEBUG_TEMPROOT.

    On a disk, each commit of an index waits for the disk, while threads of a test search or poll: this took 40 % of the
    CPU time of the tests of the index. Slow tests write too much for the memory of a small host.
    """
    if (
        "not slow" in config.getoption("markexpr")
        and os.access(MEMORY_FILES, os.W_OK)
        and shutil.disk_usage(MEMORY_FILES).free >= MEMORY_FILES_BYTES
    ):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FILES))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without garbage collection, and exclude their objects from all later garbage collections.

    Modules and test items live as long as the process. Garbage collection of them took 0.9 of 5.5 CPU-seconds of the
    collection of tests and 6 % of the CPU time of the tests after it. A higher threshold saves another 5 %.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
        _frozen_modules["count"] = len(sys.modules)
    finally:
        gc.set_threshold(20_000)
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Exclude the objects of modules that a test imported, such as PyTorch, from all later garbage collections.

    These collections took 2.7 of 75 CPU-seconds of the tests of the export.
    """
    if len(sys.modules) > _frozen_modules.get("count", 0) + 300:
        gc.collect()
        gc.freeze()
        _frozen_modules["count"] = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, and give slow tests more time."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & EXPORTED:
            item.add_marker("export")
        if "tiny_server" in fixtures:
            item.add_marker("server")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(scope="session", autouse=True)
def start_servers_faster() -> Iterator[None]:
    """Give later servers the record of the first server's check of hnswlib, and state engine and size of micro-batches.

    Each server in a new data directory starts a process for the check, which takes a fifth of the CPU time of its
    start. Without a stated size, each server measures the best one, and on a busy host repeats that: with MiniLM, this
    took 20 CPU-seconds of the tests. A test that needs the measurement states `--batch-tokens 0 --engine auto`.
    """
    start, record = ServerProcess.__init__, ""

    def start_faster(
        self: ServerProcess, models: Mapping[str, Path], data_dir: Path, *flags: str, **options: str
    ) -> None:
        nonlocal record
        marker = data_dir / "hnswlib-checked"
        if record and data_dir.is_dir() and not marker.exists():
            marker.write_text(record, encoding="ascii")
        if "--batch-tokens" not in flags:
            flags = (*flags, "--batch-tokens", "512")
        if "--engine" not in flags:
            flags = (*flags, "--engine", "onnxruntime")
        start(self, models, data_dir, *flags, **options)
        if marker.is_file():
            record = marker.read_text(encoding="ascii")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "__init__", start_faster)
        yield


@pytest.fixture(scope="session")
def server(
    minilm_bundle: Path, classifier_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with an embedding model `minilm` and a classifier `modules`, and without a cache of results."""
    models = {"minilm": minilm_bundle, "modules": classifier_bundle}
    process = ServerProcess(models, tmp_path_factory.mktemp("data"), "--cache-bytes", "0")
    yield process
    assert process.stop() == 0, process.output


@pytest.fixture(scope="session")
def tiny_server(
    tiny_bundle: Path, other_tiny_bundle: Path, tiny_classifier_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server of tiny models with random weights: embedding models `tiny` and `other`, classifier `letters`."""
    models = {"tiny": tiny_bundle, "other": other_tiny_bundle, "letters": tiny_classifier_bundle}
    process = ServerProcess(models, tmp_path_factory.mktemp("data"))
    yield process
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """A client of `server`, with a timeout of 300 s for busy hosts."""
    with Client(server.address, timeout=300) as connected:
        yield connected
