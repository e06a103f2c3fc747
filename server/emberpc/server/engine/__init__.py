"""From texts to numbers: tokenising, micro-batches, ONNX Runtime. Knows nothing of gRPC or the index."""

from emberpc.server.engine.calls import Caller, Lane
from emberpc.server.engine.engine import Engine
from emberpc.server.engine.inference import Inference
from emberpc.server.engine.models.loading import Loader
from emberpc.server.engine.models.model import Model, ModelLoadError, Tell
from emberpc.server.engine.models.registry import Registry
from emberpc.server.engine.models.watching import ModelsDirectory
from emberpc.server.engine.tokenizing import Truncation

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
