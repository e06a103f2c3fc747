"""From texts to numbers: tokenising, micro-batches, ONNX Runtime. Knows nothing of gRPC or the index."""

from emberpc.server.engine.calls import Caller, Lane
from emberpc.server.engine.engine import Engine
from emberpc.server.engine.inference import Inference
from emberpc.server.engine.model import Model, ModelLoadError
from emberpc.server.engine.tokenizing import Truncation

__all__ = ["Caller", "Engine", "Inference", "Lane", "Model", "ModelLoadError", "Truncation"]
