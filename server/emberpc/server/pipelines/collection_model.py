"""Check that the served model with the name in a collection's spec is the model that made the collection's vectors."""

from __future__ import annotations

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, CollectionSpec
from emberpc.server.engine import Engine, Model
from emberpc.server.errors import Code, ServiceError


def newer_fingerprint(engine: Engine, spec: CollectionSpec) -> str:
    """Return the fingerprint that must replace the one in a collection's spec; empty: nothing must be replaced.

    Returns:
        The present fingerprint (hex) of the served model with the name in the spec, if the spec has the legacy
        fingerprint of this model, which is a fingerprint by the rule of older versions. Otherwise an empty string, also
        if the collection has no model, or no model with the name is served.
    """
    model = engine.registry.served(spec.model) if spec.model else None
    if model is None or spec.model_fingerprint == model.fingerprint:
        return ""
    return model.fingerprint if is_model_of(spec, model) else ""


def is_model_of(spec: CollectionSpec, model: Model) -> bool:
    """Return whether a model is the one that makes the vectors of a collection with a spec.

    This is the case if the fingerprint in the spec is the present or the legacy fingerprint of the model. Names are not
    compared. False if the collection has no model.
    """
    return spec.model_fingerprint in filter(None, (model.fingerprint, model.legacy_fingerprint))


def check_same_model(before: CollectionSpec, now: CollectionSpec) -> None:
    """Check that a collection still has the model that it had when a call began that brings its own vectors.

    Args:
        before: spec of the collection when the call began.
        now: present spec of the collection.

    Raises:
        ServiceError: FAILED_PRECONDITION if the fingerprints in the two specs differ.
    """
    if before.model_fingerprint == now.model_fingerprint:
        return
    raise ServiceError(
        Code.FAILED_PRECONDITION,
        f"collection {now.name!r} changed from model {before.model!r} to {now.model!r} while the call waited, so the "
        "vectors of the call do not belong to it; call again with vectors of the new model, or with texts",
        reason="MODEL_MISMATCH",
        metadata={"collection": now.name, "model": now.model},
    )


def collection_model(engine: Engine, collection: CollectionBackend) -> Model:
    """Return the served model that embeds a collection's texts, and hold it until the running asyncio task ends.

    Raises:
        ServiceError: FAILED_PRECONDITION if the collection has no model, or the served model with the name in its spec
            did not make its vectors or is no embedding model; NOT_FOUND if no model with this name is served.
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
    if not is_model_of(spec, model):
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
