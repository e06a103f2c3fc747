"""Checkpoints: files from which an interrupted training continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emberpc.export.errors import NoRoomError
from emberpc.export.files import staged
from emberpc.export.timing import Cost


@dataclass
class TrainingState:
    """State of a training after some or all epochs: tensors by name, scores of the epochs, and time spent."""

    tensors: dict[str, torch.Tensor]
    epoch: int = 0
    scores: list[float] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)


class Checkpoints:
    """The checkpoints of all trainings that one outcome needs, in a folder. Remove them once the outcome is stored.

    Args:
        folder: folder of the files; it is created if it does not exist. None: nothing is stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._given: list[Checkpoint] = []
        #: Time that resumed trainings had taken before this process continued them.
        self.spent = Cost()

    def of(self, **what: object) -> Checkpoint:
        """Return the checkpoint of one training. The same arguments give the same file.

        Args:
            what: everything that the training's result depends on: texts, labels, encoder, seed and so on. Values are
                plain data or have a `repr` that identifies them.
        """
        if self._folder is None:
            return Checkpoint(None)
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:24]
        self._given.append(Checkpoint(self._folder / f"{key}.safetensors", self.spent))
        return self._given[-1]

    def remove(self) -> None:
        """Delete all checkpoints that `of` returned."""
        for checkpoint in self._given:
            checkpoint.remove()


class Checkpoint:
    """The checkpoint of one training.

    Args:
        path: its file; None: nothing is stored.
        spent: `read` adds the time of a resumed training to it.
    """

    def __init__(self, path: Path | None, spent: Cost | None = None) -> None:
        self._path = path
        self._spent = spent or Cost()

    def read(self) -> TrainingState | None:
        """Return the stored state, or None if there is no file or it cannot be read."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(str(self._path), framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                spent = Cost(float(metadata["seconds"]), float(metadata["cpu_seconds"]))
                state = TrainingState(tensors, int(metadata["epoch"]), json.loads(metadata["scores"]), spent)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None  # the file is damaged or has another format: start from the beginning
        self._spent.seconds += spent.seconds
        self._spent.cpu_seconds += spent.cpu_seconds
        return state

    def write(self, state: TrainingState) -> None:
        """Store a state in place of the previous one.

        Raises:
            NoRoomError: the file cannot be written.
        """
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.tensors.items()}
            metadata = {
                "epoch": str(state.epoch),
                "scores": json.dumps(state.scores),
                "seconds": str(state.spent.seconds),
                "cpu_seconds": str(state.spent.cpu_seconds),
            }
            with staged(self._path) as beside:
                save_file(tensors, str(beside), metadata)
        except (OSError, SafetensorError) as error:
            raise NoRoomError(
                f"the checkpoint {self._path} cannot be written ({type(error).__name__}); is there room on the disk?"
            ) from error

    def remove(self) -> None:
        """Delete the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
