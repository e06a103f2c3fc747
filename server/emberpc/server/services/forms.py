"""In what form vectors are asked for, the same for one call and for a stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.server.engine import Model, Truncation
from emberpc.server.errors import invalid
from emberpc.server.services import requests
from emberpc.v1 import embedding_pb2, types_pb2
from emberpc.wire import vectors

Matrix = npt.NDArray[np.float32]

_DTYPES = frozenset(types_pb2.DataType.values())


@dataclass(frozen=True)
class EmbeddingForm:
    """How texts go into a model, and how their vectors come out; checked.

    `unit`: they are still to be given length 1.
    """

    prompt: str
    truncation: Truncation
    dimensions: int
    dtype: types_pb2.DataType.ValueType
    unit: bool

    @classmethod
    def of(
        cls, model: Model, asked: embedding_pb2.EmbedRequest | embedding_pb2.EmbedStreamConfig, path: str = ""
    ) -> EmbeddingForm:
        """Read it from a request to a model.

        Args:
            model: the model.
            asked: the message whose fields say it.
            path: what goes before the names of those fields, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT for what the model cannot give or this server does not know.
        """
        check_dimensions(model, asked.dimensions, f"{path}dimensions")
        if asked.dtype not in _DTYPES:
            raise invalid(f"{path}dtype", f"is {asked.dtype}, which is no DataType")
        unit = asked.normalize if asked.HasField("normalize") else model.manifest.normalize
        if model.manifest.normalize and not unit:
            raise invalid(
                f"{path}normalize", f"is false, and model {model.name!r} gives vectors of length 1 only; leave it"
            )
        return cls(
            prompt=requests.prompt(model.manifest.prompts, asked.input_kind, f"{path}input_kind"),
            truncation=requests.truncation(asked.truncation, f"{path}truncation"),
            dimensions=asked.dimensions,
            dtype=asked.dtype,
            # What has length 1 already has it still unless it is cut.
            unit=unit and (bool(asked.dimensions) or not model.manifest.normalize),
        )

    def bytes_per_text(self, model: Model) -> int:
        """Return the bytes of one vector of a model in this form, as float32, which the server holds it as."""
        return 4 * (self.dimensions or model.manifest.dimensions)

    def encode(self, output: Matrix) -> types_pb2.Vectors:
        """Return a model's output, float32 (texts, all dimensions), as it was asked for."""
        return vectors.encode(shape(output, self.dimensions, unit=self.unit), self.dtype)


def check_dimensions(model: Model, dimensions: int, field: str = "dimensions") -> None:
    """Raise INVALID_ARGUMENT unless a model can give vectors of a size; 0 stands for its own."""
    sizes = {model.manifest.dimensions, *model.manifest.matryoshka_dimensions} if dimensions else set()
    if dimensions and dimensions not in sizes:
        listed = ", ".join(map(str, sorted(sizes)))
        raise invalid(field, f"is {dimensions}; model {model.name!r} gives vectors of {listed} dimensions")


def shape(matrix: Matrix, dimensions: int, *, unit: bool) -> Matrix:
    """Cut vectors to their first dimensions and give them length 1.

    Args:
        matrix: float32, shape (rows, all dimensions).
        dimensions: how many to keep; 0: all.
        unit: whether to give them length 1; a vector of zeros stays one.
    """
    cut = matrix[:, :dimensions] if dimensions else matrix
    if not unit:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(np.divide(cut, norms, out=np.zeros_like(cut), where=norms > 0), dtype=np.float32)
