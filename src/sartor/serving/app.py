"""The HTTP application: routes, and errors in the shape that clients expect."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from sartor import __version__
from sartor.serving.access import Access
from sartor.serving.errors import ApiError, internal, respond
from sartor.serving.gateway import Gateway
from sartor.serving.intake import Intake
from sartor.serving.keys import KeyFile
from sartor.serving.metrics import add_metrics_route
from sartor.serving.openai_adapters import add_adapter_routes
from sartor.serving.openai_api import add_openai_routes
from sartor.serving.openai_embeddings import add_embeddings_route
from sartor.serving.openapi import describe
from sartor.serving.request_record import record_of
from sartor.serving.telemetry import Observer, Sink


class _DirectRoute(APIRoute):
    """Calls its endpoint with the request and nothing between.

    No endpoint here has FastAPI take its parameters apart; to find that out anew for each request,
    and to look for routes within included routers, takes longer than all the rest of routing.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def create_app(
    gateway: Gateway,
    intake: Intake,
    *,
    keys: KeyFile | None = None,
    cors_origins: Sequence[str] = (),
    sinks: Sequence[Sink] = (),
) -> FastAPI:
    """The OpenAI-compatible API over a gateway and an intake, which the caller starts and closes.

    ``keys`` None lets everybody in. Pages of ``cors_origins`` may ask from a browser.
    ``sinks`` are called with the record of each request that has ended.
    """
    app = FastAPI(title="Sartor", version=__version__)
    app.router.route_class = _DirectRoute
    add_openai_routes(app.router, gateway, intake)
    add_embeddings_route(app.router, gateway, intake)
    add_adapter_routes(app.router, gateway, intake)
    add_metrics_route(app.router, gateway)
    app.add_middleware(Access, keys=keys, origins=cors_origins)
    if cors_origins:
        # Outside of the gate: a browser asks first, without a key, whether it may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(Observer, gateway=gateway, sinks=sinks)  # the last: the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, intake.limits, with_keys=keys is not None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    record_of(request).error = error
    return respond(error)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:256]
    if error.status_code == 404:
        message = f"there is nothing at {path}; the API lives below /v1"
    elif error.status_code == 405:
        message = f"{request.method[:32]} is not possible at {path}"
    else:
        message = str(error.detail)
    wrong = ApiError(error.status_code, message)
    record_of(request).error = wrong
    answer = respond(wrong)
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; clients learn no internals.
    wrong = internal(f"the server made a mistake ({type(error).__name__})")
    record = record_of(request)
    record.error = wrong
    answer = respond(wrong)
    answer.headers["x-request-id"] = record.id  # this goes past the Observer
    return answer
