"""What binds a collection to the model that made its vectors."""

from __future__ import annotations

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, CollectionSpec
from emberpc.server.engine import Engine, Model
from emberpc.server.errors import Code, ServiceError


def unbound_fingerprint(engine: Engine, spec: CollectionSpec) -> str:
    """Return the fingerprint that a collection bound under the old scheme is to be bound by.

    Returns:
        The fingerprint (hex) of the served model. Empty if the collection needs no other: it has no model, or it is
        bound under the present scheme, or the served model is not the one that it is bound to, or the old fingerprint
        of the served model does not cover all its weights.
    """
    model = engine.registry.served(spec.model) if spec.model else None
    if model is None or spec.model_fingerprint == model.fingerprint:
        return ""
    return model.fingerprint if matches(model, spec) else ""


def matches(model: Model, spec: CollectionSpec) -> bool:
    """Return whether a model is the one that made a collection's vectors, by the present scheme or the old one."""
    return spec.model_fingerprint in filter(None, (model.fingerprint, model.legacy_fingerprint))


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
    if not matches(model, spec):
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
