"""Serve the models in the subfolders of a directory under the names of the subfolders, and follow changes on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TypeAlias

from emberpc.bundle.manifest import MANIFEST_NAME
from emberpc.server.engine.models.loading import Loader
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.models.registry import Registry
from emberpc.server.errors import ServiceError

log = logging.getLogger(__name__)

#: For each file in a folder and its subfolders: path, size in bytes, time of the last change (ns since 1970) and inode
#: number.
_State: TypeAlias = "tuple[tuple[str, int, int, int], ...]"


class _Outcome(Enum):
    #: The model of the folder is loaded, or the folder needs no load (see `ModelsDirectory._deal_with`).
    DEALT_WITH = auto()
    #: The last attempt to load the model of the folder failed, or the folder cannot be read.
    FAILED = auto()
    #: The last attempt to load the model failed, and the folder has changed since the previous poll: a program may be
    #: writing to the folder still. The model is loaded when the next poll finds the folder unchanged.
    MOVING = auto()


@dataclass(frozen=True)
class _Look:
    """A folder as a poll found it, and what the poll did."""

    state: _State
    outcome: _Outcome


class ModelsDirectory:
    """Serves each subfolder of a directory that holds a manifest, under the name of the subfolder.

    Subfolders whose name starts with a dot, for example unfinished exports, are skipped. A folder is loaded at the
    first poll that finds it. If it cannot be served, the reason is logged, and the version that was served before
    stays. The folder is tried again when its files have changed and two polls in a row find the same files. A model of
    the same name that was loaded from another place stays. A model that a call unloaded is loaded again only when the
    files of its folder change.

    Args:
        folder: the directory. It must be the models directory of `loader`.
        registry: the models.
        loader: changes the models; its thread runs `poll`.
        reserved: names that this directory may not serve.
    """

    def __init__(self, folder: Path, registry: Registry, loader: Loader, reserved: Collection[str] = ()) -> None:
        self._folder = folder
        self._registry = registry
        self._loader = loader
        self._reserved = frozenset(reserved)
        self._looks: dict[str, _Look] = {}
        #: SHA-256 of the manifest that this object loaded last, by the name of the model.
        self._loaded: dict[str, bytes] = {}
        self._missing: set[str] = set()
        self._readable = True

    def poll(self) -> None:
        """Load new subfolders, reload those whose manifest changed, and unload models whose subfolder is gone.

        A model is unloaded only when two polls in a row miss its subfolder.

        If the directory cannot be read, all models stay. Errors of reading and of loading are logged, not raised.
        """
        try:
            names = sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))
            self._unload_missing()
        except OSError as error:
            if self._readable:
                log.warning("%s cannot be read (%s); what is served stays", self._folder, error.strerror)
            self._readable = False
            return
        self._readable = True
        for name in names:
            self._look_at(name)
        self._looks = {name: look for name, look in self._looks.items() if name in names}

    def _unload_missing(self) -> None:
        """Unload the models of this directory whose folders are missing in two polls in a row.

        One poll is not enough, since a folder that is replaced is missing for a moment. The model of a folder without a
        manifest stays, since a program may be writing that folder.
        """
        missing = {model.name for model in self._registry.models() if self._owns(model) and not model.folder.is_dir()}
        for name in sorted(missing & self._missing):
            self._loader.unload(name)
        self._missing = missing

    def _look_at(self, name: str) -> None:
        last = self._looks.get(name)
        try:
            if not (self._folder / name / MANIFEST_NAME).is_file():
                return
            state = _state_of(self._folder / name)
            if last is None or last.outcome is _Outcome.DEALT_WITH:
                due = last is None or state != last.state
            else:
                due = last.outcome is _Outcome.MOVING and state == last.state
            if due:
                self._looks[name] = _Look(state, self._deal_with(name))
            elif last is not None and state != last.state:
                self._looks[name] = _Look(state, _Outcome.MOVING)
        except FileNotFoundError:
            log.debug("%s is being replaced or removed; the next poll decides", self._folder / name)
        except OSError as error:
            if last is None or last.state:
                log.warning("%s is not served: it cannot be read (%s)", self._folder / name, error.strerror)
            self._looks[name] = _Look((), _Outcome.FAILED)

    def _deal_with(self, name: str) -> _Outcome:
        """Load a new subfolder or reload a changed one; return FAILED if that fails, which is logged, else DEALT_WITH.

        Nothing is loaded if the name is reserved, if a model of that name was loaded from another place, or if the
        model is served and its manifest is the same as when it was loaded. The result is DEALT_WITH then.

        Raises:
            OSError: the manifest cannot be read.
        """
        served = next((model for model in self._registry.models() if model.name == name), None)
        if name in self._reserved or (served is not None and not self._owns(served)):
            log.warning("%s is not served: model %s was loaded from another place", self._folder / name, name)
            return _Outcome.DEALT_WITH
        manifest = hashlib.sha256((self._folder / name / MANIFEST_NAME).read_bytes()).digest()
        if served is not None and self._loaded.get(name) == manifest:
            return _Outcome.DEALT_WITH
        try:
            if served is None:
                self._loader.load(name, name)
            else:
                self._loader.reload(name)
        except ServiceError as error:
            stays = "" if served is None else "; the version that was served before stays"
            log.warning("%s is not served: %s%s", self._folder / name, error.message, stays)
            return _Outcome.FAILED
        self._loaded[name] = manifest
        return _Outcome.DEALT_WITH

    def _owns(self, model: Model) -> bool:
        return model.name not in self._reserved and model.folder == self._folder / model.name


def _state_of(folder: Path) -> _State:
    found = []
    for where, _, files in os.walk(folder):
        for file in files:
            path = Path(where, file)
            facts = path.lstat()
            found.append((str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return tuple(sorted(found))
