"""Load models and run texts through them in micro-batches, by ONNX Runtime or OpenVINO; without gRPC and index."""

from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.choices import Choices, Runtimes
from emberpc.server.engine.engine import Engine
from emberpc.server.engine.inference import Inference, InferenceRequest
from emberpc.server.engine.models.loading import Loader
from emberpc.server.engine.models.model import Model, ModelLoadError, OnStage
from emberpc.server.engine.models.registry import Registry
from emberpc.server.engine.models.watching import ModelsDirectory
from emberpc.server.engine.tokenizing import Truncation

__all__ = [
    "Caller",
    "Choices",
    "Engine",
    "Inference",
    "InferenceRequest",
    "Lane",
    "Loader",
    "Model",
    "ModelLoadError",
    "ModelsDirectory",
    "OnStage",
    "Registry",
    "Runtimes",
    "Truncation",
]
