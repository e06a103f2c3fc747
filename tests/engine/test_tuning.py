"""The fastest way to run a model is measured once on an idle host, kept in a file, and never changes the vectors."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import onnx
import pytest

from emberpc.server.engine import Choices, Engine, Model, ModelLoadError, Registry, Runtimes, choices, measuring, tuning
from emberpc.server.engine.measuring import HostBusyError, Speeds, best_size
from emberpc.server.engine.models import agreement as agreements
from emberpc.server.engine.models.agreement import MeasurementStoppedError, agreement, agreement_texts
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import Output, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, TokenIds
from emberpc.server.engine.tuning import tune

# Not `openvino` itself, whose import sends a usage event.
module = pytest.importorskip("emberpc.server.engine.sessions.openvino", reason="the extra openvino is not installed")
ov = module.ov
needs_bf16 = pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this processor has no bf16 instructions",
)


def give_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Let the measurement see a host on which its thread has a share of a core. Each run takes the same time."""
    looks = count()
    monkeypatch.setattr(measuring, "perf_counter", lambda: float(next(looks)))
    monkeypatch.setattr(measuring, "thread_time", lambda: share * next(looks))


def give_gains(monkeypatch: pytest.MonkeyPatch, **gains: float) -> None:
    """Let the measurement find these speeds, as multiples of that of ONNX Runtime, and 256 tokens as the best size."""

    def compare(encoders: Mapping[Runtime, Encoder], *_: object) -> Speeds[Runtime]:
        return Speeds([{each: 1 / gains.get(f"{each.engine}_{each.precision}", 1.0) for each in encoders}])

    def sizes(*_: object) -> Speeds[int]:
        return Speeds([{128: 2.0, 256: 1.0, 512: 1.0}])

    monkeypatch.setattr(tuning, "compare_encoders", compare)
    monkeypatch.setattr(tuning, "compare_sizes", sizes)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare precisions on 40 texts, which takes less time."""
    texts = agreement_texts()
    assert len(texts) >= 1000
    for module in (agreements, tuning):
        monkeypatch.setattr(module, "agreement_texts", lambda: texts[:40])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engines.json"


def runtimes(file: Path | None, engine: str = "auto", precision: str = "auto", batch_tokens: int = 0) -> Runtimes:
    return Runtimes({"": engine}, {"": precision}, 2, batch_tokens, Choices(file))


def test_the_smallest_batch_size_near_the_best_rate_is_chosen() -> None:
    def speeds(**rates: float) -> Speeds[int]:
        return Speeds([{int(size[1:]): 1 / rate for size, rate in rates.items()}])

    assert best_size(speeds(_128=90.0, _256=95.0, _512=100.0, _1024=70.0)) == 256
    assert best_size(speeds(_128=90.0, _256=91.0, _512=100.0, _1024=105.0)) == 512


def test_every_engine_is_measured_with_several_lengths_and_one_engine_with_several_sizes(
    tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[Encoder, set[tuple[int, int]]] = {}
    run = Encoder.run

    def counted(encoder: Encoder, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        shapes.setdefault(encoder, set()).add((len(batch), len(batch[0])))
        return run(encoder, batch, threads)

    model, both = Model.load("m", tiny_bundle), runtimes(file, precision="fp32")
    monkeypatch.setattr(Encoder, "run", counted)
    give_share(monkeypatch, 1.0)
    choice = tune(model, both)
    assert choice is not None
    assert (choice.engine, choice.precision) == ("onnxruntime", "fp32")  # each run takes the same time
    assert choice.batch_tokens in measuring.SIZES
    longest = model.manifest.max_tokens
    first, second = shapes.values()
    assert second >= {(512 // length, length) for length in (8, min(32, longest))}
    assert first >= {(size // min(32, longest), min(32, longest)) for size in measuring.SIZES}


def test_a_choice_is_measured_once_and_again_if_its_record_is_unusable(
    tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = Model.load("m", tiny_bundle), runtimes(file)
    sha256 = model.encoder.sha256
    give_gains(monkeypatch, openvino_fp32=1.2)
    assert found.is_due("m", sha256)
    assert found.plan("m", sha256).reason == "not measured yet"
    assert tune(model, found)
    again = runtimes(file)
    assert not again.is_due("m", sha256)
    plan = again.plan("m", sha256)
    assert (plan.runtime, plan.batch_tokens) == (Runtime("openvino", "fp32", 2), 256)
    assert "measured on one thread" in plan.reason
    assert again.is_due("m", "another file")
    good = file.read_text()
    for damaged in ("no JSON", "[1]", "{}", good.replace('"format": 1', '"format": 9'), good.replace("256", '"x"')):
        file.write_text(damaged)
        assert runtimes(file).is_due("m", sha256)
        assert runtimes(file).plan("m", sha256).runtime == Runtime("onnxruntime", "fp32", 2)
    file.unlink()
    os.mkfifo(file)
    assert runtimes(file).is_due("m", sha256)


def test_a_choice_of_another_host_is_not_used(tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load("m", tiny_bundle)
    give_gains(monkeypatch, openvino_fp32=1.2)
    tune(model, runtimes(file))
    monkeypatch.setattr(choices, "usable_cores", lambda: 77)
    assert runtimes(file).is_due("m", model.encoder.sha256)
    assert runtimes(file).plan("m", model.encoder.sha256).runtime.engine == "onnxruntime"


def test_an_engine_that_fails_on_a_text_is_left_out(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    model = Model.load("m", tiny_bundle)
    give_share(monkeypatch, 1.0)
    monkeypatch.setattr(module.OpenVinoSession, "run", fail)
    choice = tune(model, runtimes(None, precision="fp32"))
    assert choice is not None
    assert choice.engine == "onnxruntime"
    assert "openvino fp32 is not measured, since it fails on a text" in caplog.text


def test_a_busy_host_gives_no_choice(tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_share(monkeypatch, 0.5)
    with pytest.raises(HostBusyError, match="^the host was busy$"):
        tune(Model.load("m", tiny_bundle), runtimes(file))
    assert not file.exists()


def test_nothing_is_loaded_if_the_engines_may_not_fit_into_memory(
    tiny_bundle: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check counts external weights, too, and the memory of all engines, since they are loaded at the same time."""
    folder = tmp_path / "external"
    shutil.copytree(tiny_bundle, folder)
    graph = onnx.load(str(folder / "onnx" / "model.onnx"))
    weights = "model.onnx.data"
    onnx.save(
        graph, str(folder / "onnx" / "model.onnx"), save_as_external_data=True, location=weights, size_threshold=0
    )
    model = Model.load("m", tiny_bundle)
    monkeypatch.setattr(Model, "load", None)
    monkeypatch.setattr(tuning, "encoder_of", None)
    for place in (tiny_bundle, folder):
        size = sum(path.stat().st_size for path in (place / "onnx").iterdir())
        needed = 3 * (2 * size + 100 * 2**20)
        monkeypatch.setattr(tuning, "free_memory", lambda needed=needed: needed - 1)
        with pytest.raises(
            HostBusyError, match=r"measuring 3 engines may take 31\d MB of memory, and 31\d MB are free"
        ):
            tune(dataclasses.replace(model, folder=place), runtimes(file))
        monkeypatch.setattr(tuning, "free_memory", lambda needed=needed: needed)
        with pytest.raises(TypeError):  # the next step is to load
            tune(dataclasses.replace(model, folder=place), runtimes(file))


def test_a_measurement_can_be_stopped_between_batches(tiny_bundle: Path, file: Path) -> None:
    model, looks = Model.load("m", tiny_bundle), count()
    with pytest.raises(MeasurementStoppedError):
        tune(model, runtimes(file), lambda: next(looks) > 20)
    assert not file.exists()


@pytest.mark.parametrize(("gain", "engine"), [(1.09, "onnxruntime"), (1.11, "openvino")])
def test_another_engine_is_chosen_from_a_gain_of_a_tenth_on(
    gain: float, engine: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_gains(monkeypatch, openvino_fp32=gain)
    choice = tune(Model.load("m", tiny_bundle), runtimes(None, precision="fp32"))
    assert choice is not None
    assert choice.engine == engine
    assert f"openvino fp32 {gain:.2f} times" in choice.reason


def test_an_engine_that_differs_at_the_limits_of_the_model_is_not_chosen(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_gains(monkeypatch, openvino_fp32=2.0)
    monkeypatch.setattr(TextTokenizer, "highest_id", 39)  # the model has rows for the ids 0 to 38
    choice = tune(Model.load("m", tiny_bundle), runtimes(None, precision="fp32"))
    assert choice is not None
    assert choice.engine == "onnxruntime"
    assert "the graph fails for the token id 39 in ONNX Runtime" in choice.reason


@needs_bf16
@pytest.mark.parametrize(("same", "precision"), [(0.991, "bf16"), (0.989, "fp32")])
def test_bf16_is_chosen_only_if_its_neighbours_are_those_of_fp32(
    same: float, precision: str, tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_gains(monkeypatch, openvino_fp32=1.2, openvino_bf16=2.0)
    monkeypatch.setattr(agreements, "neighbour_agreement", lambda *_: same)
    model, found = Model.load("m", tiny_bundle), runtimes(file)
    choice = tune(model, found)
    assert choice is not None
    assert (choice.engine, choice.precision) == ("openvino", precision)
    assert ("agrees with fp32 in 98.9 %" in choice.reason.replace("%", " %")) is (precision == "fp32")
    served = Model.load("m", tiny_bundle, runtimes=found)
    assert served.plan.runtime.precision == precision
    assert served.fingerprint == model.fingerprint


def test_an_agreement_is_measured_once_and_never_replaced(tiny_bundle: Path, file: Path) -> None:
    model, stored, runs = Model.load("m", tiny_bundle), Choices(file), count()
    precise = Runtime("openvino", "fp32")

    def stop() -> bool:
        next(runs)
        return False

    found = agreement(model, stored, precise, model.encoder, model.encoder, stop)
    assert found == 1.0
    assert next(runs) >= 2
    stored.keep_agreement(model.encoder.sha256, "openvino", "fp32", 0.5)
    runs = count()
    assert agreement(model, Choices(file), precise, model.encoder, model.encoder, stop) == 1.0
    assert next(runs) == 0


def test_a_classifier_with_logits_is_compared_by_its_labels(
    tiny_classifier_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load("m", tiny_classifier_bundle)
    object.__setattr__(model, "head", None)
    monkeypatch.setattr(agreements, "best_labels", lambda logits: logits[:, 0] * 0)
    assert agreement(model, Choices(None), Runtime(), model.encoder, model.encoder, lambda: False) == 1.0


def test_a_chosen_engine_that_cannot_load_the_model_gives_way_to_the_first_one(
    tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise SessionError("model.onnx cannot be compiled by OpenVINO")

    found = runtimes(file, precision="fp32")
    give_gains(monkeypatch, openvino_fp32=2.0)
    tune(Model.load("m", tiny_bundle), found)
    assert Model.load("m", tiny_bundle, runtimes=found).plan.runtime.engine == "openvino"
    monkeypatch.setattr("emberpc.server.engine.sessions.openvino.OpenVinoSession.__init__", broken)
    with ThreadPoolExecutor(1) as pool:
        registry = Registry(pool, found)
        assert registry.load("m", tiny_bundle).plan.runtime.engine == "onnxruntime"
        assert "cannot be compiled by OpenVINO; the engine that was measured to be fastest is not used" in caplog.text
        stated = Registry(pool, runtimes(file, "openvino", "fp32"))
        with pytest.raises(ModelLoadError, match="cannot be compiled by OpenVINO"):
            stated.load("m", tiny_bundle)
        registry.close()


@needs_bf16
@pytest.mark.parametrize("same", [0.995, 0.98])
def test_stated_bf16_has_the_fingerprint_of_fp32_if_it_agrees(
    same: float,
    tiny_bundle: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured = count()

    def neighbours(*_: object) -> float:
        next(measured)
        return same

    monkeypatch.setattr(agreements, "neighbour_agreement", neighbours)
    exact = Model.load("m", tiny_bundle).fingerprint
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            registry = Registry(pool, runtimes(file, "openvino", "bf16", 512))
            model = registry.load("m", tiny_bundle)
            assert registry.load("n", tiny_bundle).encoder is model.encoder
            assert model.plan.runtime.precision == "bf16"
            assert (model.fingerprint == exact) is (same >= 0.99)
            registry.close()
    assert next(measured) == 1
    told = "bf16 agrees with fp32 in 98.00 %, less than 99 %, so the vectors count as those of another model"
    assert caplog.text.count(told) == (0 if same >= 0.99 else 4)  # at each loading


def test_the_engine_uses_the_measured_size_at_once_and_another_engine_after_a_reload(
    tiny_bundle: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as pool:
        engine = Engine(Registry(pool, runtimes(file)), pool, workers=1, batch_tokens=0, max_queue_tokens=1000)
        model = engine.registry.load("m", tiny_bundle)
        assert model.encoder.batch_tokens == 0
        assert engine.due() == [model]
        give_gains(monkeypatch)
        assert engine.tune(model)
        assert model.encoder.batch_tokens == 256
        assert engine.outdated() == []
        assert engine.due() == []
        file.unlink()
        give_gains(monkeypatch, openvino_fp32=1.5)
        assert engine.tune(model)
        assert engine.outdated() == [model]
        reloaded = engine.registry.load("m", tiny_bundle, fresh=True)
        assert (reloaded.plan.runtime.engine, reloaded.encoder.batch_tokens) == ("openvino", 256)
        give_share(monkeypatch, 0.5)
        monkeypatch.setattr(tuning, "compare_encoders", measuring.compare_encoders)
        assert not engine.tune(reloaded)
        assert engine.outdated() == []
        engine.close()


def test_a_model_whose_file_changed_is_not_measured(tiny_bundle: Path, tmp_path: Path, file: Path) -> None:
    path = tmp_path / "model.onnx"
    model = Model.load("m", tiny_bundle)
    path.write_bytes(b"another file")
    model.encoder._session.path = path  # type: ignore[misc]
    with pytest.raises(SessionError, match="changed since the model was loaded"):
        tune(model, runtimes(file))
