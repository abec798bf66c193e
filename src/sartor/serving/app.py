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
from sartor.serving.access import Access, slow_down
from sartor.serving.errors import ApiError, internal, respond
from sartor.serving.gateway import Gateway
from sartor.serving.hosts import Hosts
from sartor.serving.intake import Intake
from sartor.serving.keys import KeyFile
from sartor.serving.metrics import add_metrics_route
from sartor.serving.openai_adapters import add_adapter_routes
from sartor.serving.openai_api import add_openai_routes
from sartor.serving.openai_embeddings import add_embeddings_route
from sartor.serving.openapi import describe
from sartor.serving.request_record import record_of
from sartor.serving.targets import fixed_paths, nearest, not_found, printable
from sartor.serving.telemetry import Observer, Sink


class _DirectRoute(APIRoute):
    """Calls its endpoint with the request and nothing between, and answers HEAD as GET.

    No endpoint here has FastAPI take its parameters apart; to find that out anew for each request,
    and to look for routes within included routers, takes longer than all the rest of routing.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.methods and "GET" in self.methods:
            self.methods.add("HEAD")  # the HTTP server leaves the body out (RFC 9110, 9.3.2)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def create_app(
    gateway: Gateway,
    intake: Intake,
    *,
    keys: KeyFile | None = None,
    cors_origins: Sequence[str] = (),
    hosts: Hosts | None = None,
    sinks: Sequence[Sink] = (),
) -> FastAPI:
    """The OpenAI-compatible API over a gateway and an intake, which the caller starts and closes.

    ``keys`` None lets everybody in. Pages of ``cors_origins`` may ask from a browser.
    ``hosts`` are the names under which a server without keys may be asked; None takes any.
    ``sinks`` are called with the record of each request that has ended.
    """
    app = FastAPI(title="Sartor", version=__version__, redirect_slashes=False)
    app.router.route_class = _DirectRoute
    add_openai_routes(app.router, gateway, intake)
    add_embeddings_route(app.router, gateway, intake)
    add_adapter_routes(app.router, gateway, intake)
    add_metrics_route(app.router, gateway, intake)
    app.add_middleware(Access, keys=keys, origins=cors_origins, hosts=hosts)
    if cors_origins:
        # Outside of the gate: a browser asks first, without a key, whether it may send one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    paths = fixed_paths(app.routes)
    app.add_middleware(Observer, gateway=gateway, sinks=sinks, paths=paths)  # last, so outermost
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
    await slow_down(error)
    return respond(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, headers = request.scope["path"], dict(error.headers or {})
    if request.method == "OPTIONS" and path == "*":  # of the server as a whole
        return Response(status_code=204, headers={"Allow": ", ".join(_methods(request.app))})
    if error.status_code == 404:
        paths = fixed_paths(request.app.routes)
        near = record_of(request).near = nearest(path, paths)
        wrong = not_found(path, paths, near)
    elif error.status_code == 405:
        headers["Allow"] = allowed = ", ".join(sorted(headers["Allow"].split(", ")))
        wrong = ApiError(
            405,
            f"{printable(request.method[:32])} is not possible at {printable(path)}; use {allowed}",
        )
    else:
        wrong = ApiError(error.status_code, str(error.detail))
    record_of(request).error = wrong
    answer = respond(wrong)
    answer.headers.update(headers)
    return answer


def _methods(app: FastAPI) -> list[str]:
    """What some route or other takes, and OPTIONS."""
    methods = {"OPTIONS"}
    return sorted(methods.union(*(getattr(route, "methods", None) or () for route in app.routes)))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; clients learn no internals.
    wrong = internal(f"the server made a mistake ({type(error).__name__})")
    record = record_of(request)
    record.error = wrong
    answer = respond(wrong)
    answer.headers["x-request-id"] = record.id  # this goes past the Observer
    return answer
