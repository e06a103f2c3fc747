"""If the sources or the targets of a similarity fail, the others are not embedded any more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from emberpc.server.engine import Caller, InferenceRequest, Truncation
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.embedding import InputKind, SimilarityRequest, TextEmbedder
from emberpc.server.pipelines.limits import Limits


@pytest.mark.server
@pytest.mark.parametrize(("sources", "targets"), [(["bad"], ["good"]), (["good"], ["bad"])])
async def test_a_failure_of_sources_or_targets_ends_the_other_inference(sources: list[str], targets: list[str]) -> None:
    ended: list[str] = []

    async def infer(request: InferenceRequest) -> None:
        await asyncio.sleep(0)
        if request.texts == ["bad"]:
            raise ServiceError(Code.INVALID_ARGUMENT, "the text is bad")
        try:
            await asyncio.Event().wait()
        finally:
            ended.extend(request.texts)

    model = SimpleNamespace(manifest=SimpleNamespace(prompts=SimpleNamespace(query="", passage="")))
    engine: Any = SimpleNamespace(model=lambda *_: model, inferrer=SimpleNamespace(infer=infer))
    embedder = TextEmbedder(engine, Limits(10, 1000, 1000, 1000, 1000))
    request = SimilarityRequest("", sources, targets, InputKind.PASSAGE, InputKind.PASSAGE, Truncation.REFUSE)
    with pytest.raises(ServiceError, match="the text is bad"):
        await embedder.similarities(request, Caller())
    assert ended == ["good"]
