"""Settings from flags, the environment and the configuration file, and their limits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.settings import Settings, SettingsError
from emberpc.server.settings_sources import load_settings


def test_flags_override_the_environment_and_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "emberpc.toml"
    file.write_text('workers = 1\nbatch_tokens = 100\nlisten = "0.0.0.0:1"\nmodel = ["a=x", "y"]\n')
    loaded = load_settings(
        {"workers": 3, "listen": None},
        config_file=file,
        environ={"EMBERPC_WORKERS": "2", "EMBERPC_BATCH_TOKENS": "200", "EMBERPC_DRAIN_SECONDS": "1.5"},
    )
    assert loaded.settings.workers == 3
    assert loaded.settings.batch_tokens == 200
    assert loaded.settings.listen == "0.0.0.0:1"
    assert loaded.settings.drain_seconds == 1.5
    assert loaded.settings.named_models() == {"a": Path("x"), "y": Path("y")}
    assert loaded.sources["workers"] == "flag"
    assert loaded.sources["batch_tokens"] == "environment EMBERPC_BATCH_TOKENS"
    assert loaded.sources["listen"] == f"file {file}"
    assert loaded.sources["log_level"] == "default"
    assert set(loaded.sources) == {field.name for field in dataclasses.fields(Settings)}


def test_the_configuration_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "emberpc.toml"
    file.write_text("workers = 7\n")
    assert load_settings({}, environ={"EMBERPC_CONFIG": str(file)}).settings.workers == 7


def test_models_in_the_environment_are_separated_by_commas() -> None:
    loaded = load_settings({}, environ={"EMBERPC_MODEL": "a=x, b=y"})
    assert loaded.settings.named_models() == {"a": Path("x"), "b": Path("y")}


def test_milvus_is_configured_and_its_token_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "emberpc.toml"
    file.write_text(
        'index_backend = "milvus"\nmilvus_uri = "https://milvus:19530/texts"\nmilvus_token = "root:secret"\n'
    )
    settings = load_settings({}, config_file=file, environ={}).settings
    assert (settings.index_backend, settings.milvus_token) == ("milvus", "root:secret")
    assert "secret" not in repr(settings)
    settings = load_settings({}, config_file=file, environ={"EMBERPC_MILVUS_TOKEN": "key"}).settings
    assert settings.milvus_token == "key"


@pytest.mark.parametrize(
    ("backend", "uri", "words"),
    [
        ("milvus", "", "give both or neither"),
        ("embedded", "http://milvus:19530", "give both or neither"),
        ("redis", "", "must be embedded or milvus"),
        ("milvus", "milvus:19530", "must be such as"),
        ("milvus", "http://root:secret@milvus:19530", "password in milvus_token"),
        ("milvus", "data.db", "must be such as"),
    ],
)
def test_an_index_backend_with_an_invalid_address_is_refused(backend: str, uri: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Settings(index_backend=backend, milvus_uri=uri)


def test_variants_are_set_by_the_names_of_models() -> None:
    environ = {"EMBERPC_MODEL": "a=x,b=x", "EMBERPC_VARIANT": "b=int8"}
    assert load_settings({}, environ=environ).settings.named_variants() == {"b": "int8"}


def test_engines_and_precisions_have_a_default_and_values_for_single_models() -> None:
    environ = {"EMBERPC_MODEL": "a=x,b=x", "EMBERPC_ENGINE": "openvino,b=onnxruntime", "EMBERPC_PRECISION": "a=bf16"}
    settings = load_settings({}, environ=environ).settings
    assert settings.named_engines() == {"": "openvino", "b": "onnxruntime"}
    assert settings.named_precisions() == {"a": "bf16"}


def test_variants_and_options_can_name_models_of_the_models_directory() -> None:
    environ = {
        "EMBERPC_MODELS_DIR": "models",
        "EMBERPC_VARIANT": "later=int8",
        "EMBERPC_MODEL_OPTION": "later.pooling=mean",
        "EMBERPC_MODEL_ADMIN": "true",
    }
    settings = load_settings({}, environ=environ).settings
    assert (settings.models_dir, settings.model_admin) == (Path("models"), True)
    assert settings.named_variants() == {"later": "int8"}
    assert settings.named_options() == {"later": {"pooling": "mean"}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"variant": ["int8"], "model": ["a"]}, "NAME=VARIANT"),
        ({"variant": ["a="], "model": ["a"]}, "NAME=VARIANT"),
        ({"variant": ["b=int8"], "model": ["a"]}, "no model 'b'.*there are: a"),
        ({"variant": ["a=int8", "a=fp16"], "model": ["a"]}, "has two"),
        ({"engine": ["onnx"]}, "must be auto, onnxruntime, openvino, or NAME=openvino for one model"),
        ({"engine": ["=openvino"], "model": ["a"]}, "must be auto, onnxruntime, openvino"),
        ({"engine": ["a="], "model": ["a"]}, "must be auto, onnxruntime, openvino"),
        ({"engine": ["b=openvino"], "model": ["a"]}, "no model 'b'.*there are: a"),
        ({"engine": ["openvino", "onnxruntime"]}, "the default is given twice"),
        ({"precision": ["fp16"]}, "must be auto, fp32, bf16"),
        ({"precision": ["a=bf16", "a=fp32"], "model": ["a"]}, "model 'a' is given twice"),
        ({"watch_models": 2.0}, "nothing to watch; give models_dir"),
        ({"watch_models": -1.0, "models_dir": "m"}, "not be negative"),
        ({"model_admin": "perhaps"}, "true or false"),
        ({"workers": "many"}, "whole number"),
        ({"workers": -1}, "not be negative"),
        ({"workers": True}, "whole number"),
        ({"max_texts": 0}, "at least 1"),
        ({"drain_seconds": "soon"}, "a number"),
        ({"log_level": "loud"}, "one of debug"),
        ({"listen": "50051"}, "HOST:PORT"),
        ({"listen": "localhost:99999"}, "the port must be 0 to 65535"),
        ({"listen": "localhost:" + "9" * 5000}, "the port must be 0 to 65535"),
        ({"listen": "::1"}, "HOST:PORT"),
        ({"listen": "::1:50051"}, r"HOST:PORT, such as .* or \[::1\]:50051"),
        ({"listen": 5}, "a string"),
        ({"model": ["x/a", "y/a"]}, "same name"),
        ({"model": ["=x"]}, "no name"),
        ({"model": ["a b=x"]}, "no name"),
        ({"model": ["minilm="]}, "'minilm=' has no folder"),
        ({"model": [1]}, "list of strings"),
        ({"data_dir": 1}, "a path"),
    ],
)
def test_an_invalid_value_is_refused_with_the_name_of_the_setting(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        load_settings(overrides, environ={})
    assert next(iter(overrides)) in str(refused.value)


@pytest.mark.parametrize("value", ["0", "-1", "1e-9"])
def test_handshake_seconds_below_1_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"handshake_seconds is .*; it must be at least 1 \(default: 20\)"):
        load_settings({"handshake_seconds": value}, environ={})


@pytest.mark.parametrize(
    "field", [field for field in dataclasses.fields(Settings) if isinstance(field.default, (int, float))]
)
def test_every_number_setting_refuses_minus_1(field: dataclasses.Field[object]) -> None:
    if isinstance(field.default, bool):
        return
    with pytest.raises(SettingsError, match=f"{field.name} is -1(\\.0)?; it must "):
        load_settings({"models_dir": "m", field.name: "-1"}, environ={})


def test_more_than_8_workers_for_each_core_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberpc.bundle.cores.usable_cores", lambda: 2)
    assert load_settings({"workers": 16}, environ={}).settings.workers == 16
    with pytest.raises(SettingsError, match=r"workers is 17; it must be at most 16: 8 for each core .* \(2\)"):
        load_settings({"workers": 17}, environ={})


def test_importing_settings_loads_no_engine() -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}; import emberpc.server.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {"numpy", "grpc", "onnxruntime", "emberpc.server.engine"} & set(loaded)


@pytest.mark.parametrize("name", ["data_dir", "models_dir"])
def test_an_empty_path_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is '' .* it must be a path"):
        load_settings({}, environ={f"EMBERPC_{name.upper()}": ""})


def test_drain_seconds_above_the_limit_of_a_thread_are_refused() -> None:
    maximum = 2**31 // 1000
    assert load_settings({"drain_seconds": maximum}, environ={}).settings.drain_seconds < threading.TIMEOUT_MAX
    with pytest.raises(SettingsError, match=f"drain_seconds is .* at most {maximum}"):
        load_settings({"drain_seconds": maximum + 1}, environ={})


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", str(10**20)])
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(Settings) if isinstance(field.default, (int, float))]
)
def test_a_number_out_of_range_is_refused_with_the_name_of_the_setting(name: str, value: str) -> None:
    if isinstance(getattr(Settings(), name), bool):
        return
    with pytest.raises(SettingsError, match=name):
        load_settings({name: value}, environ={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"workrs = 1", "no setting 'workrs'"),
        (b"workers = ", "is not TOML"),
        (b"listen = '\xff'", "is not TOML"),
        (b"models = " + b"[" * 10_000, "is not TOML"),
        (b"workers = 1.9", r"workers is 1\.9 .*; it must be a whole number"),
        (b"cache_bytes = 0.9", r"cache_bytes is 0\.9 .*; it must be a whole number"),
        (None, "cannot be read"),
    ],
)
def test_an_invalid_configuration_file_is_refused(tmp_path: Path, text: bytes | None, words: str) -> None:
    file = tmp_path / "emberpc.toml"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(SettingsError, match=words) as refused:
        load_settings({}, config_file=file, environ={})
    assert str(file) in str(refused.value)


@given(listen=st.text(max_size=30))
def test_any_listen_address_is_accepted_or_refused_with_a_settings_error(listen: str) -> None:
    try:
        settings = Settings(listen=listen)
    except SettingsError:
        return
    host, _, port = settings.listen.rpartition(":")
    assert host
    assert 0 <= int(port) < 2**16
