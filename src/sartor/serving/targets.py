"""What a request is for: every form of its target brought to a path, and help where there is
nothing at that path.

Source: RFC 9112, section 3.2 (forms of the target), RFC 9110, section 7.4 (misdirected requests).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote

from starlette.routing import BaseRoute, Match

from sartor.serving.errors import ApiError, invalid

UNMATCHED = "unmatched"
"""The route of a request for a path that no route has: such a path is the client's invention, may
hold anything, and has no place in a log."""

_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_SHOWN = 120
_NEAR = 0.75
_API = "/v1"
_PAGES = ("/docs", "/docs/oauth2-redirect", "/redoc")
"""For people with a browser; no client means one of these."""


def take_target(scope: Any, paths: Collection[str]) -> ApiError | None:
    """Brings the target of an ASGI scope into the form of a path, in place.

    An absolute one (``GET http://host/v1/models``) counts by its path, and its host in place of
    the Host header. One of ``paths`` with a slash behind it is that path. What is returned is why
    the request cannot be served.
    """
    raw: bytes = scope.get("raw_path") or b""
    problem = None
    if found := _ABSOLUTE.fullmatch(raw):
        scheme, authority, rest = found.groups()
        problem = _check(scheme.decode("ascii").lower(), authority)
        if not rest:  # RFC 9112, section 3.2.4
            rest = b"*" if scope["method"] == "OPTIONS" else b"/"
        scope["raw_path"], scope["path"] = rest, unquote(rest.decode("ascii", "replace"))
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [(b"host", authority), *others]
    path = scope["path"]
    if path.endswith("/") and (bare := path.rstrip("/")) in paths:
        scope["path"], scope["raw_path"] = bare, bare.encode()
    return problem


def _check(scheme: str, authority: bytes) -> ApiError | None:
    if scheme == "https":
        # RFC 9110, section 7.4: not over a connection that is not secured.
        return ApiError(
            421,
            "the target of the request is an https address, but this connection is plain http; "
            "ask for an http address, or only for the path",
            code="misdirected_request",
        )
    if scheme != "http":
        return invalid("the target of the request is no http address; ask for a path, like /health")
    if not authority or b"@" in authority:
        return invalid("the target of the request names no host; ask for a path, like /health")
    return None


def route_of(scope: Any) -> str:
    """The path of the route that a request is for, as the routes spell it, or UNMATCHED; nothing
    where it did not come as far as an application with routes."""
    if "route" in scope:
        return getattr(scope["route"], "path", UNMATCHED)
    if "app" not in scope:
        return ""
    # It was answered before it came to the routes, by a gate or because there is none for it.
    routes = (r for r in scope["app"].routes if r.matches(scope)[0] is not Match.NONE)
    return getattr(next(routes, None), "path", UNMATCHED)


def fixed_paths(routes: Collection[BaseRoute]) -> list[str]:
    """Paths without a parameter, those of the API first."""
    paths = [getattr(route, "path", "") for route in routes]
    known = [path for path in paths if path and "{" not in path and path not in _PAGES]
    return sorted(known, key=lambda path: not path.startswith(_API))


def nearest(path: str, paths: Collection[str]) -> str:
    """The one of ``paths`` that a path was probably meant to be, or nothing."""
    by_name = {known.lower(): known for known in paths}
    tidy = "/" + "/".join(part for part in path.lower().split("/") if part)
    while tidy.startswith(_API + _API + "/"):
        tidy = tidy.removeprefix(_API)
    for guess in (tidy, _API + tidy):
        if guess in by_name:
            return by_name[guess]
    near = difflib.get_close_matches(tidy[:_SHOWN], by_name, 1, _NEAR)
    return by_name[near[0]] if near else ""


def not_found(path: str, paths: Collection[str], near: str) -> ApiError:
    """404 for a path that no route has, with the way out: the ``near`` one that was meant, or all
    of ``paths``."""
    tidy = path.lower().rstrip("/")
    if near and tidy.startswith(_API + _API + "/"):
        hint = (
            f"{_API} is there twice: the client puts it before its paths by itself, so take it "
            f"off the client's base address. The path is {near}"
        )
    elif near and tidy == near.removeprefix(_API):
        hint = (
            f"did you mean {near}? The client's base address must end in {_API}, if the client "
            "does not add it"
        )
    elif near:
        hint = f"did you mean {near}?"
    else:
        hint = f"this server has {', '.join(paths)}"
    return ApiError(404, f"there is nothing at {printable(path)}; {hint}")


def printable(text: str) -> str:
    """What a client sent, short, and without characters that do more than show."""
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
