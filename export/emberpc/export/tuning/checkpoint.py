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

from emberpc.export.errors import NoSpaceError
from emberpc.export.files import staged
from emberpc.export.timing import Cost


@dataclass
class TrainingState:
    """State of a training after `epoch` epochs.

    `tensors` has the parameters, the best epoch's parameters and the optimizer's state, by name; after the training,
    only the best epoch's parameters. `scores` has the held-out score of each epoch. `spent` is the time of the
    training, that of earlier processes included.
    """

    tensors: dict[str, torch.Tensor]
    epoch: int = 0
    scores: list[float] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)


class Checkpoints:
    """The checkpoints of all trainings that make one result. Remove the checkpoints once the result is stored.

    Args:
        folder: folder of the checkpoint files; the first checkpoint creates it. None: nothing is stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._given: list[Checkpoint] = []
        #: Wall and CPU time that resumed trainings had taken before this process continued them.
        self.spent = Cost()

    def of(self, **what: object) -> Checkpoint:
        """Return the checkpoint of one training. Equal arguments give the same file, so the training is resumed.

        Args:
            what: everything that the training's result depends on: texts, labels, encoder, seed and so on. Each value
                is plain data, or has a `repr` that identifies it.
        """
        if self._folder is None:
            return Checkpoint(None)
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:24]
        self._given.append(Checkpoint(self._folder / f"{key}.safetensors", self.spent))
        return self._given[-1]

    def remove(self) -> None:
        """Delete the files of all checkpoints that `of` returned."""
        for checkpoint in self._given:
            checkpoint.remove()


class Checkpoint:
    """The checkpoint of one training.

    Args:
        path: file of the checkpoint; None: nothing is stored.
        spent: time to which `read` adds the time that a stored training has taken; default: a new one.
    """

    def __init__(self, path: Path | None, spent: Cost | None = None) -> None:
        self._path = path
        self._spent = spent or Cost()

    def read(self) -> TrainingState | None:
        """Return the stored state, and add its time to the `Cost` that the constructor got.

        None is returned if there is no file, or the file is damaged, has another format or cannot be read.
        """
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
        """Store a state atomically in place of the previous one; do nothing if the checkpoint has no path.

        Raises:
            NoSpaceError: the file cannot be written.
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
            raise NoSpaceError(
                f"the checkpoint {self._path} cannot be written ({type(error).__name__}); "
                "is there free space on the disk?"
            ) from error

    def remove(self) -> None:
        """Delete the checkpoint's file if there is one."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
