"""The routes of the OpenAI API: from a typed request to the engine's, and back."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.engine.request import Request as EngineRequest
from sartor.serving.access import Visit
from sartor.serving.answer import Answer, Delta
from sartor.serving.answer_events import AnswerEvents
from sartor.serving.errors import timed_out
from sartor.serving.folding import Folding
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.keys import ApiKey
from sartor.serving.limits import ServerLimits
from sartor.serving.names import ServedName
from sartor.serving.openai_format import ChatShape, CompletionShape, Json, Shape
from sartor.serving.openai_responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
    TextCompletionChunk,
)
from sartor.serving.openai_types import ChatRequest, CompletionRequest, StreamOptions
from sartor.serving.openapi import operation
from sartor.serving.prepare import Prepared, View, find_model, seen_names
from sartor.serving.request_record import record_of
from sartor.serving.streaming import Disconnected, EventStream, while_connected


class JSONAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def add_openai_routes(router: APIRouter, gateway: Gateway, intake: Intake) -> None:
    """Those below /v1 that make text and list models, and /health."""

    @router.post(
        "/v1/chat/completions",
        openapi_extra=operation(ChatCompletion, body=ChatRequest, chunk=ChatCompletionChunk),
    )
    async def chat_completions(request: Request) -> Response:
        prepared = await intake.prepared(
            request, ChatRequest, view_of(request, intake.limits), visit_of(request)
        )
        model = gateway.models[prepared.model]
        shape = ChatShape(
            prepared.name,
            model.fingerprint,
            logprobs=prepared.params.logprobs is not None,
            stream=bool(prepared.body.stream),
        )
        return await _answer(gateway, intake.limits, request, prepared, shape)

    @router.post(
        "/v1/completions",
        openapi_extra=operation(TextCompletion, body=CompletionRequest, chunk=TextCompletionChunk),
    )
    async def completions(request: Request) -> Response:
        prepared = await intake.prepared(
            request, CompletionRequest, view_of(request, intake.limits), visit_of(request)
        )
        model = gateway.models[prepared.model]
        shape = CompletionShape(
            prepared.name,
            model.fingerprint,
            n=prepared.params.n,
            logprobs=prepared.params.logprobs is not None,
            echoes=prepared.echoes,
        )
        return await _answer(gateway, intake.limits, request, prepared, shape)

    @router.get("/v1/models", openapi_extra=operation(ModelList))
    async def models(request: Request) -> Response:
        view = view_of(request, intake.limits)
        cards = [_card(served) for served in seen_names(gateway.models, view)]
        return JSONAnswer({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}", openapi_extra=operation(ModelCard, in_path="name"))
    async def model(request: Request) -> Response:
        view = view_of(request, intake.limits)
        return JSONAnswer(_card(find_model(gateway.models, request.path_params["name"], view)))

    @router.get("/health", openapi_extra=operation(Health, others={503: Health}))
    async def health(request: Request) -> Response:
        key, view = visit_of(request).key, view_of(request, intake.limits)
        problems = {name: gateway.problem(name) for name in gateway.models}
        well = gateway.phase == "ready" and not gateway.draining and not any(problems.values())
        state = "draining" if gateway.draining else gateway.phase
        told = {
            name: (problem if key.sees_all else "failed") if problem else state
            for name, problem in problems.items()
            if view.shows(name)
        }
        body = {"status": "ok" if well else state, "models": told}
        return JSONAnswer(body, status_code=200 if well else 503)


def visit_of(request: Request) -> Visit:
    visit: Visit = request.state.visit
    return visit


def view_of(request: Request, limits: ServerLimits) -> View:
    """What of the server the request's key may see."""
    key = visit_of(request).key
    return View(limits, frozenset(key.models) if key.models else None)


def _card(served: ServedName) -> Json:
    """What clients learn of a model by one of its names, or by that of an adapter or preset."""
    model, behind = served.model, {}
    if served.adapter or served.preset:
        behind = {"parent": model.name}
    elif served.name != model.name:
        behind = {"root": model.name}
    return {
        "id": served.name,
        "object": "model",
        "created": model.created,
        "owned_by": "sartor",
        "context_length": model.context_length,
        "makes": model.makes,
        **behind,
    }


def make_requests(prepared: Prepared[Any], key: ApiKey) -> list[EngineRequest]:
    """One request of the engine a prompt, in the name of the key that it came with."""
    body, params = prepared.body, prepared.params
    salt = key.salt
    if body.cache_salt is not None:
        salt += "\n" + body.cache_salt  # no key's salt has a line break
    all_left_out = prepared.left_out or (0,) * len(prepared.prompts)
    return [
        EngineRequest(
            id=uuid4().hex,
            prompt=prompt,
            params=params,
            # Drawn here, so that a replay draws the same tokens.
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            salt=salt,
            tenant=key.name,
            share=key.share,
            priority=key.priority - (body.priority or 0),
            adapter=prepared.adapter,
            left_out=left_out,
        )
        for prompt, left_out in zip(prepared.prompts, all_left_out, strict=True)
    ]


def submit(
    gateway: Gateway, limits: ServerLimits, request: Request, prepared: Prepared[Any]
) -> Answer:
    """Hands a request to the engine, within the limits of its key and of its time.

    Raises ApiError 429 or 503; later on the answer raises 504 where it takes too long.
    """
    visit, record = visit_of(request), record_of(request)
    record.asks(prepared.body)
    visit.hold(len(prepared.prompts) * prepared.params.n)
    requests = make_requests(prepared, visit.key)
    gateway.books.begin(record, prepared.model, requests)
    answer = gateway.submit(prepared.model, requests)
    visit.callback(lambda: visit.spend(answer.prompt_tokens + answer.completion_tokens))
    if limits.request_seconds:
        loop = asyncio.get_running_loop()
        end = loop.call_later(
            limits.request_seconds, answer.fail, timed_out(limits.request_seconds)
        )
        visit.callback(end.cancel)
    return answer


async def _answer(
    gateway: Gateway,
    limits: ServerLimits,
    request: Request,
    prepared: Prepared[ChatRequest] | Prepared[CompletionRequest],
    shape: Shape,
) -> Response:
    answer = submit(gateway, limits, request, prepared)
    if prepared.body.stream:
        options = prepared.body.stream_options or StreamOptions()
        events = AnswerEvents(shape, answer, options, record_of(request))
        stall = gateway.timing.stall
        return EventStream(answer.next, events.pieces, answer.close, stall, events.write_at_once)
    folding = Folding(shape)
    try:
        await while_connected(request.receive, _fold(answer, folding))
    except Disconnected:
        return Response(status_code=499)  # nobody reads it
    finally:
        answer.close()
    return JSONAnswer(folding.finish(answer))


async def _fold(answer: Answer, folding: Folding) -> None:
    """Everything of an answer, as it comes. Raises ApiError."""
    while new := await answer.next():
        for delta in new:
            folding.add(delta)
        answer.keep(folding.size)


async def whole(answer: Answer) -> list[Delta]:
    """Everything of an answer, once it is complete. Raises ApiError."""
    deltas: list[Delta] = []
    while new := await answer.next():
        deltas.extend(new)
        answer.keep(sum(len(delta.embedding) for delta in deltas))
    return deltas
