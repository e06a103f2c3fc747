"""From texts to numbers: tokenising, micro-batches, ONNX Runtime. Knows nothing of gRPC or the index."""

from emberpc.server.engine.calls import Caller, Lane
from emberpc.server.engine.engine import Engine
from emberpc.server.engine.inference import Inference
from emberpc.server.engine.loading import Loader
from emberpc.server.engine.model import Model, ModelLoadError, Tell
from emberpc.server.engine.registry import Registry
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.engine.watching import ModelsDirectory

__all__ = [
    "Caller",
    "Engine",
    "Inference",
    "Lane",
    "Loader",
    "Model",
    "ModelLoadError",
    "ModelsDirectory",
    "Registry",
    "Tell",
    "Truncation",
]
