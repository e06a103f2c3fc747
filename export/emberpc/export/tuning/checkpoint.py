"""What a training needs to go on where it was interrupted."""

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
from emberpc.export.workbench import Cost


@dataclass
class TrainingState:
    """A training after some epochs, or all: tensors by name, how its epochs went, and what they took."""

    tensors: dict[str, torch.Tensor]
    epoch: int = 0
    scores: list[float] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)


class Checkpoints:
    """The checkpoints of the trainings that one outcome takes, in a folder; removed once that is stored.

    Args:
        folder: where they are kept; it is made if need be. None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._given: list[Checkpoint] = []
        #: What the trainings took before this process went on with them.
        self.spent = Cost()

    def of(self, **what: object) -> Checkpoint:
        """Return the checkpoint of one training, found again by all that it depends on.

        Args:
            what: all that it depends on: texts, labels, encoder, seed and so on; texts or plain data.
        """
        if self._folder is None:
            return Checkpoint(None)
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:24]
        self._given.append(Checkpoint(self._folder / f"{key}.safetensors", self.spent))
        return self._given[-1]

    def remove(self) -> None:
        """Forget all that were given: what came of the trainings is stored."""
        for checkpoint in self._given:
            checkpoint.remove()


class Checkpoint:
    """One training's checkpoint.

    Args:
        path: its file; None keeps nothing.
        spent: what a training took that is gone on with is added to it.
    """

    def __init__(self, path: Path | None, spent: Cost | None = None) -> None:
        self._path = path
        self._spent = spent or Cost()

    def read(self) -> TrainingState | None:
        """Return the state that was kept, or None if there is none that can be read."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(str(self._path), framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                spent = Cost(float(metadata["seconds"]), float(metadata["cpu_seconds"]))
                state = TrainingState(tensors, int(metadata["epoch"]), json.loads(metadata["scores"]), spent)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None  # it was of some other training, or damaged: begin anew
        self._spent.seconds += spent.seconds
        self._spent.cpu_seconds += spent.cpu_seconds
        return state

    def write(self, state: TrainingState) -> None:
        """Keep a state in place of the one before.

        Raises:
            NoRoomError: the folder cannot be written to.
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
        """Forget the state."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
