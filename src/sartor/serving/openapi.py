"""The API's description (OpenAPI 3.1): what routes take and answer, and every way to fail."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.routing import BaseRoute

from sartor.serving import openai_responses as responses
from sartor.serving import openai_types as types
from sartor.serving.access import OPEN_PATHS
from sartor.serving.limits import ServerLimits

Json = dict[str, Any]

_WHY = {
    400: "The request is wrong; the message says where, and what to do.",
    401: "The API key is missing, wrong or revoked.",
    403: "The key, or the web page, may not do this.",
    404: "There is no such thing, or the key may not use it.",
    408: "The body took too long to come.",
    413: "The body is too large.",
    415: "The body is no JSON, or in an encoding that is not known.",
    421: "The server has no such name as the request's Host, and is not asked under it.",
    429: "The key or the server has its fill; Retry-After says when to try again.",
    431: "The head of the request is too large.",
    500: "The server made a mistake.",
    503: "The model is not available, or the server is ending.",
    504: "The answer was not complete within the server's time for a request.",
}
_KINDS: tuple[type[BaseModel], ...] = (
    types.ChatRequest,
    types.CompletionRequest,
    types.EmbeddingRequest,
    types.LoadAdapterRequest,
    types.UnloadAdapterRequest,
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.TextCompletion,
    responses.TextCompletionChunk,
    responses.EmbeddingList,
    responses.ModelCard,
    responses.ModelList,
    responses.Health,
    responses.LoadedAdapter,
    responses.DroppedAdapter,
    responses.Error,
)
_ALWAYS = (400, 401, 403, 404, 421, 431, 500, 503)
_WITH_BODY = (408, 413, 415, 429)


def operation(
    answer: type[BaseModel],
    *,
    body: type[BaseModel] | None = None,
    chunk: type[BaseModel] | None = None,
    others: Mapping[int, type[BaseModel]] | None = None,
    in_path: str | None = None,
) -> Json:
    """The description of a route, for FastAPI's ``openapi_extra``.

    ``answer`` and ``chunk``: with status 200, as a whole and as the events of a stream; ``others``:
    statuses with an answer that is no error; ``in_path``: the parameter in the route's path.
    """
    content: Json = {"application/json": {"schema": _reference(answer)}}
    if chunk is not None:
        content["text/event-stream"] = {"itemSchema": _event(chunk)}
    found: Json = {"200": {"description": "The answer.", "content": content}}
    statuses = _ALWAYS if body is None else (*_ALWAYS, *_WITH_BODY, 504)
    for status in sorted(statuses):
        found[str(status)] = {"$ref": f"#/components/responses/{status}"}
    for status, kind in (others or {}).items():
        found[str(status)] = {
            "description": "The answer.",
            "content": {"application/json": {"schema": _reference(kind)}},
        }
    extra: Json = {"responses": found}
    if in_path is not None:
        schema = {"type": "string"}
        extra["parameters"] = [{"name": in_path, "in": "path", "required": True, "schema": schema}]
    if body is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(body)}},
        }
    return extra


def describe(app: FastAPI, limits: ServerLimits, *, with_keys: bool) -> Json:
    """The description of an app whose routes have one each (see :func:`operation`)."""
    routes = [_without_head(route) for route in app.routes]
    found = get_openapi(title=app.title, version=app.version, routes=routes)
    schemas: Json = {}
    for kind in _KINDS:
        own = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(own.pop("$defs", {}))
        schemas[kind.__name__] = own
    for path, operations in found["paths"].items():
        for described in operations.values():
            # FastAPI's own error, which this server never sends.
            described["responses"].pop("422", None)
            if with_keys and path not in OPEN_PATHS:
                described["security"] = [{"key": []}]
    _limit(schemas, limits)
    components: Json = {"schemas": schemas, "responses": _errors()}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["components"] = components
    return found


def _without_head(route: BaseRoute) -> BaseRoute:
    """HEAD is there wherever GET is, and says nothing of its own."""
    if "HEAD" not in (getattr(route, "methods", None) or ()):
        return route
    told = copy.copy(route)
    told.methods = {"GET"}  # type: ignore[attr-defined]
    return told


def _event(chunk: type[BaseModel]) -> Json:
    """One server-sent event, as OpenAPI 3.2 describes them: a chunk, an error, or the end."""
    whole = {"anyOf": [_reference(chunk), _reference(responses.Error)]}
    texts = [
        {"const": "[DONE]"},
        {"contentMediaType": "application/json", "contentSchema": whole},
    ]
    data = {"type": "string", "anyOf": texts}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _errors() -> Json:
    return {
        str(status): {
            "description": why,
            "content": {"application/json": {"schema": _reference(responses.Error)}},
        }
        for status, why in _WHY.items()
    }


def _limit(schemas: Json, limits: ServerLimits) -> None:
    """Writes this server's limits into the schemas of bodies."""
    for schema in schemas.values():
        for name, described in schema.get("properties", {}).items():
            for option in described.get("anyOf", [described]):
                _limit_option(name, option, limits)


def _limit_option(name: str, option: Json, limits: ServerLimits) -> None:
    items = option.get("items", {})
    if name == "n":
        _most(option, "maximum", limits.choices)
    elif name in ("max_tokens", "max_completion_tokens"):
        _most(option, "maximum", limits.max_tokens)
    elif name == "messages":
        _most(option, "maxItems", limits.messages)
    elif name == "logit_bias":
        _most(option, "maxProperties", limits.logit_biases)
        if option.get("type") == "object":
            option["additionalProperties"] = False  # what pydantic's dict of patterns means
    elif name == "stop":
        _most(option, "maxItems", limits.stop_strings)
        _most(items or option, "maxLength", limits.stop_chars)
    elif name in ("prompt", "input") and option.get("type") == "array":
        option["minItems"] = 1
        if items.get("type") != "integer":
            option["maxItems"] = limits.prompts
            if items.get("type") == "array":
                items["minItems"] = 1


_KEYWORD_TYPES = {
    "maximum": ("integer", "number"),
    "maxItems": ("array",),
    "maxProperties": ("object",),
    "maxLength": ("string",),
}


def _most(option: Json, keyword: str, limit: int) -> None:
    """Sets a limit where the keyword means something; 0 is none."""
    if limit and option.get("type") in _KEYWORD_TYPES[keyword]:
        option[keyword] = limit


def _reference(kind: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
