"""Which library runs a model, and with which precision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from emberpc.bundle.contents import Contents
from emberpc.server.engine.sessions.onnx_runtime import OnnxSession
from emberpc.server.engine.sessions.session import Session, SessionError


@dataclass(frozen=True)
class Runtime:
    """How a model is run.

    Attributes:
        engine: the library, `onnxruntime` or `openvino`.
        precision: precision of matrix products, `fp32` or `bf16`; `bf16` needs OpenVINO.
        streams: number of batches that run at the same time on one thread each. ONNX Runtime has no such limit.
        same_model: whether the vectors count as those of fp32, so that collections of one precision can be searched
            with the other.
    """

    engine: str = "onnxruntime"
    precision: str = "fp32"
    streams: int = 1
    same_model: bool = True

    @property
    def name(self) -> str:
        """Name of the engine and its precision, for people to read."""
        return f"{self.engine} {self.precision}"

    def open(self, path: Path, contents: Contents) -> Session:
        """Load an ONNX file.

        Args:
            path: the ONNX file.
            contents: reads the ONNX file and its external weight files.

        Raises:
            SessionError: a file cannot be read or loaded; OpenVINO is not installed or cannot run the file; or the
                precision needs another engine or another processor.
        """
        if self.engine == "onnxruntime":
            if self.precision != "fp32":
                raise SessionError(
                    f"{path}: --precision {self.precision} needs --engine openvino; give both, or --precision fp32"
                )
            return OnnxSession(path, contents=contents)
        try:
            # The package is an extra, and its import takes half a second.
            from emberpc.server.engine.sessions.openvino import OpenVinoSession  # noqa: PLC0415
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
            fault = "is not installed" if missing else f"cannot be imported ({error})"
            raise SessionError(
                f"{path}: --engine openvino and --precision bf16 need the extra `openvino`, which {fault}; install "
                "'emberpc[server,openvino]', or serve the model with --engine onnxruntime and --precision fp32"
            ) from error
        return OpenVinoSession(path, self.precision, self.streams, contents=contents)

    def fingerprint(self, fingerprint: str) -> str:
        """Return the fingerprint (hex) of a model that is run in this way.

        Args:
            fingerprint: fingerprint (hex) of the model's files. The result is equal to it if `same_model`: the vectors
                are those of fp32, apart from rounding.
        """
        if self.same_model:
            return fingerprint
        return hashlib.sha256(f"{fingerprint} {self.precision}".encode()).hexdigest()
