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

from emberpc.export.errors import ExportError


@dataclass
class TrainingState:
    """A training after some epochs: tensors by name, and how its epochs went."""

    tensors: dict[str, torch.Tensor]
    epoch: int = 0
    scores: list[float] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of trainings in a folder; a training that is done leaves none.

    Args:
        folder: where they are kept; it is made if need be. None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def of(self, **what: object) -> Checkpoint:
        """Return the checkpoint of one training, found again by all that it depends on.

        Args:
            what: all that it depends on: texts, labels, encoder, seed and so on; texts or plain data.
        """
        if self._folder is None:
            return Checkpoint(None)
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:24]
        return Checkpoint(self._folder / f"{key}.safetensors")


class Checkpoint:
    """One training's checkpoint; None as its path keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> TrainingState | None:
        """Return the state that was kept, or None if there is none that can be read."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(str(self._path), framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                return TrainingState(tensors, int(metadata["epoch"]), json.loads(metadata["scores"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None  # it was of some other training, or damaged: begin anew

    def write(self, state: TrainingState) -> None:
        """Keep a state in place of the one before.

        Raises:
            ExportError: the folder cannot be written to.
        """
        if self._path is None:
            return
        staged = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.tensors.items()}
            save_file(tensors, str(staged), {"epoch": str(state.epoch), "scores": json.dumps(state.scores)})
            staged.replace(self._path)
        except (OSError, SafetensorError) as error:
            staged.unlink(missing_ok=True)
            raise ExportError(
                f"the checkpoint {self._path} cannot be written ({type(error).__name__}); is there room on the disk?"
            ) from error

    def remove(self) -> None:
        """Forget the state: the training is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
