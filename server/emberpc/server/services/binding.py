"""What binds a collection to the model that made its vectors."""

from __future__ import annotations

from emberpc.bundle import Task
from emberpc.server.engine import Engine, Model
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import CollectionBackend


def collection_model(engine: Engine, collection: CollectionBackend) -> Model:
    """Return the model that embeds a collection's texts.

    Raises:
        ServiceError: FAILED_PRECONDITION if the collection takes vectors only, or its model is not the one that made
            its vectors; NOT_FOUND if its model is not served.
    """
    spec = collection.spec
    if not spec.model:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            f"collection {spec.name!r} has no model and takes vectors only; give vectors, or create one with a model",
            reason="COLLECTION_WITHOUT_MODEL",
            metadata={"collection": spec.name},
        )
    model = engine.model(spec.model, Task.EMBEDDING)
    if model.fingerprint != spec.model_fingerprint:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            f"the vectors of collection {spec.name!r} were made by another {spec.model!r} than is served now; serve "
            "the bundle that made them, or create a new collection and upsert its texts there",
            reason="MODEL_MISMATCH",
            metadata={
                "collection": spec.name,
                "model": spec.model,
                "collection_fingerprint": spec.model_fingerprint,
                "served_fingerprint": model.fingerprint,
            },
        )
    return model
