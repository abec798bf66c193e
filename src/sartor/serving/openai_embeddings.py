"""The route of the OpenAI API that turns texts into vectors."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.serving.answer import Delta
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.openai_api import JSONAnswer, submit, view_of, visit_of, whole
from sartor.serving.openai_format import Json
from sartor.serving.openai_responses import EmbeddingList
from sartor.serving.openai_types import EmbeddingRequest
from sartor.serving.openapi import operation
from sartor.serving.streaming import Disconnected, while_connected


def add_embeddings_route(router: APIRouter, gateway: Gateway, intake: Intake) -> None:
    """POST /v1/embeddings."""

    @router.post("/v1/embeddings", openapi_extra=operation(EmbeddingList, body=EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        view = view_of(request, intake.limits)
        prepared = await intake.prepared(request, EmbeddingRequest, view, visit_of(request))
        body = prepared.body
        answer = submit(gateway, intake.limits, request, prepared)
        try:
            deltas = await while_connected(request.receive, whole(answer))
        except Disconnected:
            return Response(status_code=499)  # nobody reads it
        finally:
            answer.close()
        data = [_entry(delta, body) for delta in sorted(deltas, key=lambda d: d.prompt)]
        usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
        return JSONAnswer({"object": "list", "data": data, "model": body.model, "usage": usage})


def _entry(delta: Delta, body: EmbeddingRequest) -> Json:
    data = delta.embedding
    if body.dimensions is not None:
        data = data[: 4 * body.dimensions]
    vector: str | list[float]
    if body.encoding_format == "base64":
        vector = base64.b64encode(data).decode()
    else:
        vector = np.frombuffer(data, "<f4").tolist()
    return {"object": "embedding", "index": delta.prompt, "embedding": vector}
