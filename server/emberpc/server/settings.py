"""The server's settings, with their checks. `settings_sources.py` reads them from flags, environment and a file."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberpc.server.names import NAME

INDEX_BACKENDS = ("embedded", "milvus")
ENGINES = ("auto", "onnxruntime", "openvino")
PRECISIONS = ("auto", "fp32", "bf16")
LOG_LEVELS = ("debug", "info", "warning", "error")
_MILVUS_URI = re.compile(r"https?://[^/@\s]+(/\w*)?")
#: Largest value of a numeric setting that is not in `_MAX_BY_NAME`: in seconds, about a thousand years. No use needs
#: more, and infinity is refused. `workers` and `recall_probe` have further limits.
_MAX_VALUE = 2**35
#: Largest values of the settings for which `_MAX_VALUE` is too much for technical reasons. gRPC stores
#: `max_message_bytes` and the milliseconds of `handshake_seconds` in 32 bits. No thread can wait `_MAX_VALUE` seconds.
_MAX_BY_NAME = {
    "max_message_bytes": 2**31 - 1,
    "handshake_seconds": 2**31 // 1000,
    "drain_seconds": 2**31 // 1000,
}
#: Limit of the setting `workers` for each core that the process may use. With 512 workers for each of two cores, single
#: searches took 4 to 25 s.
_MAX_WORKERS_PER_CORE = 8
#: Settings with minimum 1. The minimum of all other numeric settings is 0. `handshake_seconds` is at least 1 s since
#: gRPC closes a connection whose handshake takes longer than it, and a handshake takes several round trips.
_MIN_BY_NAME = dict.fromkeys(
    (
        *("max_queue_tokens", "max_texts", "max_text_bytes", "max_message_bytes", "max_response_bytes"),
        *("max_in_flight_bytes", "max_streams", "max_collections", "handshake_seconds"),
    ),
    1,
)


class SettingsError(ValueError):
    """Settings are invalid or contradict each other; or the TOML file is unreadable, invalid, or has an unknown key.

    The message names the setting and what it must be, and for a wrong type the source; or the file and its problem.
    """


def _setting(default: Any, doc: str, form: str = "", *, secret: bool = False) -> Any:
    """Return the dataclass field of a setting.

    Args:
        default: value of the setting if flag, environment and file do not have the setting.
        doc: help text, for `--help` and the documentation.
        form: placeholder for the value in `--help`, such as `HOST:PORT`; empty: the default placeholder.
        secret: whether the value is a secret. A secret is not shown in the `repr` of the settings, and has no flag: all
            users of a host can read the flags of its processes.
    """
    return dataclasses.field(default=default, metadata={"help": doc, "form": form, "secret": secret}, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """All settings of a server. `metadata["help"]` of a field is its help text. The constructor checks the settings."""

    model: tuple[str, ...] = _setting(
        (),
        "A bundle to serve, as DIR or NAME=DIR; several may be given. In the environment, separated by commas.",
        "[NAME=]DIR",
    )
    variant: tuple[str, ...] = _setting(
        (), "Which of a model's ONNX files to serve, as NAME=VARIANT; default: its first, fp32.", "NAME=VARIANT"
    )
    engine: tuple[str, ...] = _setting(
        (),
        "Library that runs the models, or one model: onnxruntime, openvino (with the extra of that name), or auto: the "
        "fastest one, which the server measures. Default: auto.",
        "[NAME=]ENGINE",
    )
    precision: tuple[str, ...] = _setting(
        (),
        "Precision of matrix products of the models, or of one model: fp32, bf16 (with OpenVINO, on a processor with "
        "bf16 instructions), or auto: bf16 if it is faster and the vectors are nearly the same. Default: auto.",
        "[NAME=]PRECISION",
    )
    model_option: tuple[str, ...] = _setting(
        (),
        "A property that the files of a foreign model do not state, as NAME.OPTION=VALUE, such as minilm.pooling=mean.",
        "NAME.OPTION=VALUE",
    )
    models_dir: Path | None = _setting(  # noqa: RUF009 - as below
        None,
        "Folder of bundles. Each is served under its folder's name; with --model-admin, callers may load them too.",
        "DIR",
    )
    watch_models: float = _setting(
        0.0,
        "Seconds between two checks of --models-dir for new, changed or removed bundles; 0: check only at the start.",
    )
    model_admin: bool = _setting(
        False,
        "Whether callers may load, reload and unload models. There is no authentication yet: this allows all callers.",
    )
    data_dir: Path = _setting(  # noqa: RUF009 - `_setting` gives a dataclass field
        Path("emberpc-data"), "Folder of the collections; created if it does not exist."
    )
    index_backend: str = _setting(
        "embedded", f"Index backend that stores the collections: {' or '.join(INDEX_BACKENDS)}."
    )
    milvus_uri: str = _setting("", "Address of Milvus, such as http://milvus:19530/database; https for TLS.", "URI")
    milvus_token: str = _setting(
        "", "USER:PASSWORD or API key for Milvus; in the environment or the file only.", secret=True
    )
    listen: str = _setting("127.0.0.1:50051", "Address to listen on, HOST:PORT; port 0: a free port.")
    metrics_listen: str = _setting("", "Address that serves metrics for Prometheus, HOST:PORT; empty: no metrics.")
    workers: int = _setting(
        0, "Number of threads that run models, at most 8 for each core that this process may use; 0: one for each core."
    )
    batch_tokens: int = _setting(
        0, "Maximum number of tokens of a micro-batch, with padding; 0: the server measures the best size on this host."
    )
    max_queue_tokens: int = _setting(2**20, "Limit of tokens in the queue; further calls fail with RESOURCE_EXHAUSTED.")
    cache_bytes: int = _setting(32 * 2**20, "Limit in bytes of the cache of results for repeated texts; 0: no cache.")
    record_cache_bytes: int = _setting(
        32 * 2**20, "Approximate limit in bytes of the cache of records that searches find; 0: no cache."
    )
    max_collections: int = _setting(10_000, "Maximum number of collections; creating or restoring more fails.")
    max_open_collections: int = _setting(
        0,
        "Maximum number of collections that stay open while they are not used; each takes up to 11 file descriptors. "
        "0: derived from the limit of file descriptors, at most 500.",
    )
    close_idle_seconds: float = _setting(
        1800.0, "Seconds without a call after which a collection is closed; its next call opens it. 0: never."
    )
    recall_probe: float = _setting(
        0.001, "Share of the searches that are repeated later as exact searches, to measure recall; 0: none."
    )
    max_texts: int = _setting(4096, "Maximum number of texts or records of one call.")
    max_text_bytes: int = _setting(2 * 2**20, "Limit in bytes (UTF-8) of one text.")
    max_message_bytes: int = _setting(16 * 2**20, "Limit in bytes of one request message.")
    max_response_bytes: int = _setting(32 * 2**20, "Limit in bytes of one response.")
    max_in_flight_bytes: int = _setting(
        96 * 2**20, "Limit in bytes of large requests in progress and of large responses that callers have not read."
    )
    max_streams: int = _setting(64, "Limit of open request streams (bulk embedding, upserts, restores).")
    handshake_seconds: float = _setting(
        20.0, "Seconds after which a new connection without a handshake is closed; at least 1."
    )
    drain_seconds: float = _setting(30.0, "Seconds that a stopping server waits for calls in flight.")
    log_level: str = _setting("info", f"Minimum severity of log lines: {', '.join(LOG_LEVELS)}.")

    def __post_init__(self) -> None:
        """Check the settings, alone and against each other; not token, model options, or whether files and hosts exist.

        Raises:
            SettingsError: a value is invalid, or two values contradict each other.
        """
        self._check_numbers()
        self._check_workers()
        if not 0 <= self.recall_probe <= 1:
            raise SettingsError(f"recall_probe is {self.recall_probe:g}; it must be 0 to 1")
        if self.watch_models and self.models_dir is None:
            raise SettingsError(f"watch_models is {self.watch_models:g}, with nothing to watch; give models_dir too")
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(f"log_level is {self.log_level!r}; it must be one of {', '.join(LOG_LEVELS)}")
        self._check_index()
        _check_address("listen", self.listen)
        if self.metrics_listen:
            _check_address("metrics_listen", self.metrics_listen)
        if len(self.named_models()) < len(self.model):
            raise SettingsError(f"model: two of {', '.join(self.model)} have the same name; give one as NAME=DIR")
        self.named_variants()
        self.named_options()
        self.named_engines()
        self.named_precisions()

    def _check_numbers(self) -> None:
        """Check the numeric settings: from `_MIN_BY_NAME` (or else 0) to `_MAX_BY_NAME` (or else `_MAX_VALUE`).

        Raises:
            SettingsError: a number is too small or too large, or NaN.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)):
                continue
            maximum = _MAX_BY_NAME.get(field.name, _MAX_VALUE)
            if not -maximum <= value <= maximum:  # also true for NaN
                raise SettingsError(f"{field.name} is {value}; it must be at most {maximum}")
            minimum = _MIN_BY_NAME.get(field.name, 0)
            if value < minimum:
                bound = f"be at least {minimum}" if minimum else "not be negative"
                raise SettingsError(f"{field.name} is {value:g}; it must {bound} (default: {field.default:g})")

    def _check_workers(self) -> None:
        """Raise SettingsError if the setting `workers` is more than 8 for each core that this process may use."""
        if self.workers <= _MAX_WORKERS_PER_CORE:
            return
        from emberpc.bundle.cores import usable_cores  # noqa: PLC0415 - the bundle loads numpy, settings do not need it

        cores = usable_cores()
        if self.workers > _MAX_WORKERS_PER_CORE * cores:
            raise SettingsError(
                f"workers is {self.workers}; it must be at most {_MAX_WORKERS_PER_CORE * cores}: "
                f"{_MAX_WORKERS_PER_CORE} for each core that this process may use ({cores}); 0 gives one for each"
            )

    def _check_index(self) -> None:
        """Check the index backend and the address of Milvus.

        Raises:
            SettingsError: the index backend is unknown; `milvus_uri` is set without the backend milvus, or this backend
                without `milvus_uri`; or the URI is invalid or contains a user and password.
        """
        if self.index_backend not in INDEX_BACKENDS:
            raise SettingsError(f"index_backend is {self.index_backend!r}; it must be {' or '.join(INDEX_BACKENDS)}")
        if (self.index_backend == "milvus") != bool(self.milvus_uri):
            raise SettingsError("index_backend milvus and milvus_uri go together; give both or neither")
        # pymilvus also accepts user and password in the URI. They are refused here: all users of a host can read flags.
        if self.milvus_uri and not _MILVUS_URI.fullmatch(self.milvus_uri):
            raise SettingsError(
                "milvus_uri must be such as http://milvus:19530 or https://milvus/database, with user and password in "
                "milvus_token"
            )

    def named_models(self) -> dict[str, Path]:
        """Return the folders of the setting `model` by model name; for DIR alone, that is the resolved folder's name.

        Raises:
            SettingsError: a name is not valid (`names.NAME`).
        """
        models = {}
        for entry in self.model:
            name, equals, folder = entry.partition("=")
            if not equals:
                name, folder = Path(entry).resolve().name, entry
            if not (folder and NAME.fullmatch(name)):
                raise SettingsError(
                    f"model: {entry!r} has no folder, or {name!r} is no name: 1 to 128 letters, digits, '.', '_' and "
                    "'-'; give both as NAME=DIR"
                )
            models[name] = Path(folder)
        return models

    def named_variants(self) -> dict[str, str]:
        """Return the variants of the setting `variant` by model name.

        Raises:
            SettingsError: an entry is not NAME=VARIANT; two entries are for the same model; or the setting `model` has
                no such name, and `models_dir`, whose bundles are not known yet, is not set either.
        """
        variants: dict[str, str] = {}
        for entry in self.variant:
            name, equals, variant = entry.partition("=")
            if not (name and equals and variant):
                raise SettingsError(f"variant is {entry!r}; it must be NAME=VARIANT, such as minilm=int8")
            self._check_name("variant", entry, name)
            if name in variants:
                raise SettingsError(f"variant: model {name!r} has two; give it one, or serve the bundle by two names")
            variants[name] = variant
        return variants

    def _check_name(self, setting: str, entry: str, name: str) -> None:
        """Raise SettingsError if no model can have a name: `model` has none, and `models_dir` is not set."""
        models = self.named_models()
        if name not in models and self.models_dir is None:
            raise SettingsError(
                f"{setting}: there is no model {name!r} for {entry!r}; there are: {', '.join(models) or 'none'}"
            )

    def named_engines(self) -> dict[str, str]:
        """Return the engines of the setting `engine` by model name; the empty name stands for all other models.

        Raises:
            SettingsError: an entry names no engine, a model that does not exist, or the same model as another entry.
        """
        return self._named_choices("engine", self.engine, ENGINES)

    def named_precisions(self) -> dict[str, str]:
        """Return the precisions of the setting `precision` by model name; the empty name is for all other models.

        Raises:
            SettingsError: an entry names no precision, a model that does not exist, or the same model as another entry.
        """
        return self._named_choices("precision", self.precision, PRECISIONS)

    def _named_choices(self, setting: str, entries: tuple[str, ...], choices: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        for entry in entries:
            name, _, choice = entry.rpartition("=")
            if choice not in choices or entry.startswith("="):
                raise SettingsError(
                    f"{setting} is {entry!r}; it must be {', '.join(choices)}, or NAME={choices[-1]} for one model"
                )
            if name:
                self._check_name(setting, entry, name)
            if name in found:
                raise SettingsError(f"{setting}: {f'model {name!r}' if name else 'the default'} is given twice")
            found[name] = choice
        return found

    def named_options(self) -> dict[str, dict[str, str]]:
        """Return the values of the setting `model_option`, by model name and option name; see `emberpc.bundle.Stated`.

        A model of the setting `model` without options has an empty dict. Names and values of options are not checked; a
        value may be empty. Of two values of an option, the last counts.

        Raises:
            SettingsError: an entry is not NAME.OPTION=VALUE, or neither `model` has the name nor is `models_dir` set.
        """
        models: dict[str, dict[str, str]] = {name: {} for name in self.named_models()}
        for entry in self.model_option:
            left, equals, value = entry.partition("=")
            name, dot, option = left.rpartition(".")  # a model's name may contain dots
            if not (equals and dot and name and option):
                raise SettingsError(
                    f"model_option is {entry!r}; it must be NAME.OPTION=VALUE, such as minilm.pooling=mean"
                )
            self._check_name("model_option", entry, name)
            models.setdefault(name, {})[option] = value
        return models


def _check_address(name: str, value: str) -> None:
    """Check that `value`, the value of the setting `name`, is HOST:PORT with a port of 0 to 65,535 and any HOST.

    Raises:
        SettingsError: HOST is empty, there is no port, or the port is not a number or too large.
    """
    host, colon, port = value.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit()) or (":" in host and not host.startswith("[")):
        raise SettingsError(f"{name} is {value!r}; it must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    if len(port) > 100 or int(port) >= 2**16:  # Python refuses to read thousands of digits
        raise SettingsError(f"{name} is {value!r}; the port must be 0 to {2**16 - 1}")
