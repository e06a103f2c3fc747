"""The best size of micro-batches is measured once on an idle host, and kept in a file that is never half-written."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from emberpc.server.engine import Engine, Model, Registry
from emberpc.server.engine.models import calibration
from emberpc.server.engine.models.calibration import Calibration, calibrated_batch_tokens, choose
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenIds


def give_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Let the measurement see a host on which its thread has a share of a core. Each run takes the same time."""
    looks = count()
    monkeypatch.setattr(calibration, "perf_counter", lambda: float(next(looks)))
    monkeypatch.setattr(calibration, "thread_time", lambda: share * next(looks))


def test_the_smallest_batch_size_near_the_best_rate_is_chosen() -> None:
    assert choose({128: 90.0, 256: 98.0, 512: 100.0, 1024: 70.0}) == 256
    assert choose({128: 90.0, 256: 91.0, 512: 100.0, 1024: 101.0}) == 512


def test_the_batch_size_is_measured_once_and_again_if_its_record_is_unusable(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run = Encoder.run

    def counted(encoder: Encoder, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        runs.append(len(batch))
        return run(encoder, batch, threads)

    model, record = Model.load("m", tiny_bundle), tmp_path / "calibration.json"
    monkeypatch.setattr(Encoder, "run", counted)
    give_share(monkeypatch, 1.0)
    first = calibrated_batch_tokens(model, record)
    assert first is not None
    assert first.batch_tokens in (128, 256, 512, 1024)
    assert not first.busy
    assert set(runs) == {4, 8, 16, 32}
    runs.clear()
    assert calibrated_batch_tokens(model, record) == first
    assert not runs
    for damaged in ("no JSON", "[1]", '{"batch_tokens": "x"}'):
        record.write_text(damaged)
        runs.clear()
        assert calibrated_batch_tokens(model, record) is not None
        assert runs
    assert calibrated_batch_tokens(model, tmp_path / "missing" / "calibration.json") is not None


@pytest.fixture
def measured(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Path]:
    """A model, and the record of a calibration on an idle host; a new calibration would choose another batch size."""
    model, record = Model.load("m", tiny_bundle), tmp_path / "calibration.json"
    give_share(monkeypatch, 1.0)
    calibrated_batch_tokens(model, record)
    monkeypatch.setattr(calibration, "choose", lambda _: 999)
    return model, record


def test_a_calibration_on_a_busy_host_is_used_but_not_stored(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "calibration.json"
    with ThreadPoolExecutor(1) as pool:
        engine = Engine(Registry(pool), pool, workers=1, batch_tokens=0, max_queue_tokens=1000)
        engine.registry.load("m", tiny_bundle)
        give_share(monkeypatch, 0.5)
        assert not engine.calibrate(record)
        assert not record.exists()
        give_share(monkeypatch, 1.0)
        assert engine.calibrate(record)
        assert record.exists()
        engine.close()


@pytest.mark.parametrize(
    "change",
    [
        {"measured": time.time() - 31 * 24 * 3600},
        {"measured": time.time() + 3600.0},
        {"measured": "yesterday"},
        {"circumstances": "another host"},
    ],
)
def test_an_old_or_foreign_calibration_is_repeated(measured: tuple[Model, Path], change: dict[str, object]) -> None:
    model, record = measured
    assert calibrated_batch_tokens(model, record) != Calibration(999)
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    assert calibrated_batch_tokens(model, record) == Calibration(999)


def test_a_calibration_recorded_by_an_earlier_version_is_repeated(measured: tuple[Model, Path]) -> None:
    """The record states neither the time of the measurement nor the number of cores."""
    model, record = measured
    known = json.loads(record.read_text())
    old = {key: known[key] for key in ("circumstances", "batch_tokens", "tokens_per_second")}
    record.write_text(json.dumps(old))
    assert calibrated_batch_tokens(model, record) == Calibration(999)


@pytest.mark.parametrize(("name", "value"), [("usable_cores", 77), ("quota", 0.5)])
def test_a_calibration_on_another_number_of_cores_is_repeated(
    measured: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    model, record = measured
    monkeypatch.setattr(calibration, name, lambda: value)
    assert calibrated_batch_tokens(model, record) == Calibration(999)


def test_a_calibration_that_cannot_be_written_leaves_the_old_record(
    measured: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, record = measured
    old = record.read_text()
    monkeypatch.setattr(calibration, "usable_cores", lambda: 77)
    monkeypatch.setattr(os, "fsync", fail)
    assert calibrated_batch_tokens(model, record) == Calibration(999)
    assert "cannot be written" in caplog.text
    assert record.read_text() == old
    assert [path.name for path in record.parent.iterdir() if path.name.startswith(record.name)] == [record.name]


def test_a_calibration_can_be_stopped_between_batches(tiny_bundle: Path, tmp_path: Path) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    assert calibrated_batch_tokens(Model.load("m", tiny_bundle), tmp_path / "calibration.json", stop) is None
    assert len(asked) == 3
    assert not (tmp_path / "calibration.json").exists()
