"""Measure how the models of the settings are run fastest on this host, without a server: `emberpc tune`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from emberpc.bundle import BundleError
from emberpc.bundle.manifest import MANIFEST_NAME
from emberpc.server.engine import Choices, Model, ModelLoadError, Runtimes
from emberpc.server.engine.choices import Choice
from emberpc.server.engine.measuring import HostBusyError
from emberpc.server.engine.sessions.session import SessionError
from emberpc.server.engine.tuning import tune
from emberpc.server.errors import StartupError
from emberpc.server.memory import keep_freed_memory
from emberpc.server.settings import Settings

#: Name of the file of the choices in the data directory.
CHOICES_NAME = "engines.json"


def runtimes_of(settings: Settings, workers: int) -> Runtimes:
    """Return how the models of the settings are run, with the choices in the data directory.

    Args:
        settings: the settings.
        workers: number of threads that run models, without the express worker.
    """
    choices = Choices(settings.data_dir / CHOICES_NAME)
    return Runtimes(settings.named_engines(), settings.named_precisions(), workers, settings.batch_tokens, choices)


def measure_models(settings: Settings, workers: int) -> Iterator[tuple[str, Choice]]:
    """Measure each model of the settings and of the models directory, and store the choices in the data directory.

    Models for which the settings leave nothing open are left out. If the host is too busy for one model, the others are
    measured all the same. The data directory is created if it does not exist.

    Args:
        settings: the settings.
        workers: number of threads that run models in a server with these settings.

    Yields:
        The name of a model, and the choice.

    Raises:
        StartupError: a model cannot be loaded or measured, or the data directory cannot be created or read; at the end
            if the host had too little free processor time or memory for some models.
    """
    keep_freed_memory()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        folders = _folders(settings)
    except OSError as error:
        raise StartupError(f"{error.filename} cannot be used ({error.strerror}); check path and permissions") from error
    runtimes = runtimes_of(settings, workers)
    variants, options = settings.named_variants(), settings.named_options()
    refused = []
    for name, folder in folders.items():
        try:
            model = Model.load(name, folder, variants.get(name, ""), options.get(name, {}), runtimes=runtimes)
            if runtimes.candidates(name, model.encoder.sha256, model.variant.engine).any_open:
                yield name, tune(model, runtimes)
        except (ModelLoadError, SessionError, BundleError) as error:
            raise StartupError(str(error)) from error
        except HostBusyError as error:
            refused.append(f"model {name!r} was not measured: {error}")
    if refused:
        raise StartupError(
            f"{'; '.join(refused)}; try again when the host has more free processor time and memory, or state "
            "--engine, --precision and --batch-tokens"
        )


def _folders(settings: Settings) -> dict[str, Path]:
    """Return the folders of the models by name: those of the models directory, and those of the setting `model`."""
    directory = settings.models_dir
    found = sorted(path for path in directory.iterdir() if (path / MANIFEST_NAME).is_file()) if directory else []
    return {path.name: path for path in found if not path.name.startswith(".")} | settings.named_models()
