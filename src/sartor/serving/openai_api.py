"""The routes of the OpenAI API: from a typed request to the engine's, and back."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from sartor.engine.request import Request as EngineRequest
from sartor.errors import UsageError
from sartor.graph import SamplingParams
from sartor.serving.errors import ApiError, internal, invalid, model_not_found, unsupported
from sartor.serving.frontend import Makes, ServedModel
from sartor.serving.gateway import Answer, Delta, Gateway
from sartor.serving.openai_format import ChatShape, CompletionShape, Json, Shape, fold, usage
from sartor.serving.openai_types import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    Generation,
    Prompts,
)
from sartor.serving.request_record import RequestRecord, record_of
from sartor.serving.streaming import (
    DONE,
    KEEP_ALIVE,
    Disconnected,
    EventStream,
    event,
    while_connected,
)
from sartor.serving.validation import parse, read_body

logger = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 15.0
_LONG_BODY = 64 * 1024


class JSONAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def create_router(gateway: Gateway) -> APIRouter:
    """Routes below /v1, and /health."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read(request, ChatRequest)
        model, adapter = find_model(gateway, body.model, "text")
        params = sampling_params(body, model)
        prompt = await model.chat_prompt(
            [message.plain() for message in body.messages], body.chat_template_kwargs or {}
        )
        model.check_prompt(prompt, "messages")
        shape = ChatShape(
            adapter or model.name,
            model.fingerprint,
            logprobs=params.logprobs is not None,
            stream=bool(body.stream),
        )
        return await _answer(
            gateway, model, request, body, shape, make_requests([prompt], params, adapter)
        )

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionRequest)
        model, adapter = find_model(gateway, body.model, "text")
        params = sampling_params(body, model)
        given = each_prompt(body.prompt, "prompt")
        prompts = await encode_prompts(given, "prompt", model)
        echoes = [
            prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
            for prompt in (given if body.echo else ())
        ]
        shape = CompletionShape(
            adapter or model.name,
            model.fingerprint,
            n=params.n,
            logprobs=params.logprobs is not None,
            echoes=echoes,
        )
        return await _answer(
            gateway, model, request, body, shape, make_requests(prompts, params, adapter)
        )

    @router.get("/v1/models")
    async def models() -> Response:
        cards = [
            _card(model, adapter)
            for model in gateway.models.values()
            for adapter in ("", *model.adapters)
        ]
        return JSONAnswer({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONAnswer(_card(*find_model(gateway, name)))

    @router.get("/health")
    async def health() -> Response:
        problems = {name: gateway.problem(name) for name in gateway.models}
        well = gateway.phase == "ready" and not gateway.draining and not any(problems.values())
        state = "draining" if gateway.draining else gateway.phase
        body = {
            "status": "ok" if well else state,
            "models": {name: problem or state for name, problem in problems.items()},
        }
        return JSONAnswer(body, status_code=200 if well else 503)

    return router


async def read(request: Request, kind: type[Any]) -> Any:
    """The typed body of a request. Raises ApiError 4xx."""
    body = await read_body(request)
    long = len(body) > _LONG_BODY
    parsed = await asyncio.to_thread(parse, kind, body) if long else parse(kind, body)
    record_of(request).asks(parsed)
    return parsed


def find_model(gateway: Gateway, name: str, makes: Makes | None = None) -> tuple[ServedModel, str]:
    """The model that a request names, and the adapter where the name is one's ("" else).

    Raises ApiError 404, and 400 where the model makes other things.
    """
    found = gateway.find(name)
    if found is None:
        known = [
            name for model in gateway.models.values() for name in (model.name, *model.adapters)
        ]
        raise model_not_found(name, known)
    if makes not in (None, found[0].makes):
        route = "/v1/embeddings" if makes == "text" else "/v1/chat/completions"
        raise invalid(f"the model {name} makes {found[0].makes}, not {makes}; use {route}", "model")
    return found


def _card(model: ServedModel, adapter: str = "") -> Json:
    return {
        "id": adapter or model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "sartor",
        "context_length": model.context_length,
        "makes": model.makes,
        **({"parent": model.name} if adapter else {}),
    }


def sampling_params(body: ChatRequest | CompletionRequest, model: ServedModel) -> SamplingParams:
    """The request's parameters as the engine takes them. Raises ApiError 400."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: only allowed where stream is true", "stream_options")
    max_tokens = body.max_tokens
    if isinstance(body, ChatRequest):
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs: only allowed where logprobs is true", "top_logprobs")
        if body.max_completion_tokens is not None:
            if max_tokens not in (None, body.max_completion_tokens):
                raise invalid(
                    "max_tokens: differs from max_completion_tokens, which is its newer name; "
                    "send one of them",
                    "max_tokens",
                )
            max_tokens = body.max_completion_tokens
    else:
        logprobs = body.logprobs
        max_tokens = max_tokens or DEFAULT_COMPLETION_TOKENS
        if body.echo and logprobs is not None:
            raise unsupported("echo", "with logprobs it asks for log probabilities of the prompt")
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    model.check_tokens(tuple(bias), "logit_bias")
    stops = tuple(body.stop_token_ids or ())
    model.check_tokens(stops, "stop_token_ids")
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "n": body.n,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
    }
    top_k = 0 if body.top_k in (None, -1) else body.top_k  # -1 is vLLM's spelling of "all"
    stop = body.stop or ()
    try:
        return SamplingParams(
            logprobs=logprobs,
            max_tokens=max_tokens,
            logit_bias=bias,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=stops,
            top_k=top_k or 0,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
    except UsageError as error:
        raise invalid(str(error)) from None


def each_prompt(given: Prompts, param: str) -> list[str | list[int]]:
    """The prompts of a request, be they one or several. Raises ApiError 400 where there is none."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise invalid(f"{param}: the list is empty; send at least one", param)
    return list(cast(list[str | list[int]], given))


async def encode_prompts(
    prompts: Sequence[str | list[int]], param: str, model: ServedModel
) -> list[tuple[int, ...]]:
    """Token ids of every prompt. Raises ApiError 400 for one that the model cannot take."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = await model.encode(prompt, param, special=True)
        else:
            ids = tuple(prompt)
        model.check_prompt(ids, param)
        encoded.append(ids)
    return encoded


def make_requests(
    prompts: Sequence[tuple[int, ...]], params: SamplingParams, adapter: str = ""
) -> list[EngineRequest]:
    # A seed is drawn here, so that a replay draws the same tokens.
    return [
        EngineRequest(
            id=uuid4().hex,
            prompt=prompt,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            adapter=adapter,
        )
        for prompt in prompts
    ]


async def _answer(
    gateway: Gateway,
    model: ServedModel,
    request: Request,
    body: Generation,
    shape: Shape,
    requests: Sequence[EngineRequest],
) -> Response:
    record = record_of(request)
    gateway.books.begin(record, model.name, requests)
    answer = gateway.submit(model.name, requests)
    try:
        if not body.stream:
            deltas = await while_connected(request.receive, whole(answer))
            return JSONAnswer(fold(shape, deltas, answer))
        # The status line waits for the first news: an error can still be one.
        first = await while_connected(request.receive, answer.next())
    except Disconnected:
        answer.close()
        return Response(status_code=499)  # nobody reads it
    except BaseException:
        answer.close()
        raise
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    pieces = _events(shape, answer, first, with_usage, record)
    return EventStream(pieces, answer.close, gateway.timing.stall)


async def whole(answer: Answer) -> list[Delta]:
    """Everything of an answer, once it is complete. Raises ApiError."""
    deltas: list[Delta] = []
    while new := await answer.next():
        deltas.extend(new)
    return deltas


async def _news(answer: Answer) -> list[Delta] | None:
    """What is new; None when there was nothing for a while."""
    try:
        return await asyncio.wait_for(answer.next(), _KEEP_ALIVE_SECONDS)
    except TimeoutError:
        return None


async def _events(
    shape: Shape, answer: Answer, first: list[Delta], with_usage: bool, record: RequestRecord
) -> AsyncIterator[bytes]:
    head = shape.head()
    blank: Json = {"usage": None} if with_usage else {}
    deltas: list[Delta] | None = first
    try:
        while deltas is None or deltas:
            if deltas is None:
                yield KEEP_ALIVE
            elif choices := [choice for delta in deltas for choice in shape.events(delta)]:
                yield b"".join(event({**head, "choices": [c], **blank}) for c in choices)
            deltas = await _news(answer)
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(answer)})
    except ApiError as error:
        record.error = error
        yield event(error.body())
    except Exception as error:  # the headers have gone out: this is the only way left to say so
        logger.exception("an answer broke off")
        record.error = internal(f"the answer broke off: {type(error).__name__}")
        yield event(record.error.body())
    yield DONE
