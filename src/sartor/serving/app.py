"""The HTTP application: routes, and errors in the shape that clients expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sartor import __version__
from sartor.serving.errors import ApiError, internal
from sartor.serving.gateway import Gateway
from sartor.serving.metrics import create_metrics_router
from sartor.serving.openai_adapters import create_adapters_router
from sartor.serving.openai_api import create_router
from sartor.serving.openai_embeddings import create_embeddings_router
from sartor.serving.openai_types import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from sartor.serving.request_record import record_of
from sartor.serving.telemetry import Observer, Sink

_BODIES = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)


def create_app(gateway: Gateway, sinks: Sequence[Sink] = ()) -> FastAPI:
    """The OpenAI-compatible API over a gateway, which the caller starts and closes.

    ``sinks`` are called with the record of each request that has ended.
    """
    app = FastAPI(title="Sartor", version=__version__)
    app.include_router(create_router(gateway))
    app.include_router(create_embeddings_router(gateway))
    app.include_router(create_adapters_router(gateway))
    app.include_router(create_metrics_router(gateway))
    app.add_middleware(Observer, gateway=gateway, sinks=sinks)  # the last: the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    def openapi() -> dict[str, Any]:
        # Bodies are read by hand, for error messages that name the parameter, so their schemas
        # are added by hand too.
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for kind in _BODIES:
                own = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(own.pop("$defs", {}))
                schemas[kind.__name__] = own
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _respond(request: Request, error: ApiError) -> JSONResponse:
    record_of(request).error = error
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _respond(request, error)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path}; the API lives below /v1"
    elif error.status_code == 405:
        message = f"{request.method} is not possible at {request.url.path}"
    else:
        message = str(error.detail)
    answer = _respond(request, ApiError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; clients learn no internals.
    answer = _respond(request, internal(f"the server made a mistake ({type(error).__name__})"))
    answer.headers["x-request-id"] = record_of(request).id  # this goes past the Observer
    return answer
