"""Who may come in, and how much of what is theirs: one gate before all routes.

With keys, every path but ``/health`` needs one (``Authorization: Bearer``, RFC 6750). Without
keys all is open, except that ``/metrics`` answers clients on this machine only, and that pages of
strangers may not ask: a browser lets any page send requests to this machine, which the ``Origin``
tells, and one that makes its own name point here (DNS rebinding) read the answers too, which the
``Host`` tells. A page has no key, so with keys neither is looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sartor.serving.errors import ApiError, forbidden, rate_limited, respond, unauthorized
from sartor.serving.hosts import Hosts, misdirected
from sartor.serving.keys import ANYONE, GUEST, STRANGER, ApiKey, KeyFile
from sartor.serving.request_record import record_of

OPEN_PATHS = frozenset({"/health"})
METRICS_PATH = "/metrics"
_REFUSAL_SECONDS = 0.2


class Bucket:
    """A token bucket that holds one minute's worth; it may go into debt by its last user."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 when it may be now."""
        self._level = min(
            self.per_minute, self._level + (now - self._filled) * self.per_minute / 60
        )
        self._filled = now
        least = min(1.0, self.per_minute)
        return 0.0 if self._level >= least else (least - self._level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass
class _Use:
    """What a key has taken of its limits."""

    streams: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)

    def bucket(self, what: str, per_minute: float, now: float) -> Bucket:
        bucket = self.buckets.get(what)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self.buckets[what] = Bucket(per_minute, now)
        return bucket


class Visit(ExitStack):
    """One HTTP request and the key it came with.

    What is pushed on it (see :class:`contextlib.ExitStack`) runs when the answer has ended: just
    before its last bytes go out, or when nobody waits for them any more.
    """

    def __init__(self, key: ApiKey, use: _Use, clock: Callable[[], float]) -> None:
        super().__init__()
        self.key = key
        self._use = use
        self._clock = clock

    def count_request(self) -> None:
        """Raises ApiError 429 where the key has made its requests of this minute, or has none of
        its tokens and time left: what comes now would be read in vain."""
        if self.key.tokens_per_minute:
            self._bucket("tokens", self.key.tokens_per_minute)
        if self.key.intake_seconds_per_minute:
            self._bucket("intake seconds", self.key.intake_seconds_per_minute)
        if self.key.requests_per_minute:
            self._bucket("requests", self.key.requests_per_minute).take(1)

    def spend_intake(self, seconds: float) -> None:
        """Books what reading the request took, whatever came of it."""
        if limit := self.key.intake_seconds_per_minute:
            self._use.bucket("intake seconds", limit, self._clock()).take(seconds)

    def hold(self, streams: int) -> None:
        """Counts answers under way until this one has ended. Raises ApiError 429."""
        limit = self.key.max_streams
        if limit and streams > limit:
            raise ApiError(
                400,
                f"the request asks for {streams} answers at once (prompts x n), but the key "
                f"{self.key.name} may have {limit}; ask for fewer",
                code="too_many_streams",
            )
        if limit and self._use.streams + streams > limit:
            raise rate_limited(
                f"the key {self.key.name} has {self._use.streams} answers under way and may have "
                f"{limit} at once; wait for one of them to end",
                "too_many_streams",
                retry_after=1,
            )
        self._use.streams += streams
        self.callback(self._release, streams)

    def spend(self, tokens: int) -> None:
        """Books the tokens of a request, once they are known."""
        if self.key.tokens_per_minute:
            now = self._clock()
            self._use.bucket("tokens", self.key.tokens_per_minute, now).take(tokens)

    def _release(self, streams: int) -> None:
        self._use.streams -= streams

    def _bucket(self, what: str, per_minute: float) -> Bucket:
        now = self._clock()
        bucket = self._use.bucket(what, per_minute, now)
        if wait := bucket.wait(now):
            raise rate_limited(
                f"the key {self.key.name} may take {per_minute:g} {what} a minute; try again in "
                f"{math.ceil(wait)} s",
                f"{what.replace(' ', '_')}_per_minute",
                retry_after=math.ceil(wait),
            )
        return bucket


async def slow_down(error: ApiError) -> None:
    """Lets who is over a limit wait a moment for the answer: whoever asks again and again at once
    would take more of the server than it is allowed."""
    if error.status == 429:
        await asyncio.sleep(_REFUSAL_SECONDS)


class Access:
    """The gate: lets a request through with a :class:`Visit` in its state, or answers it.

    ``hosts`` are the names of a server without keys; None takes any.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyFile | None = None,
        origins: Sequence[str] = (),
        hosts: Hosts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._origins = frozenset(origins)
        self._hosts = hosts
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key = self._admit(scope)
            # By name, not by entry: a changed entry does not forget what has been taken.
            visit = Visit(key, self._uses.setdefault(key.name, _Use()), self._clock)
            record_of(scope).key = key.name
            if scope["method"] == "POST":
                visit.count_request()
        except ApiError as error:
            record_of(scope).error = error
            await slow_down(error)
            await respond(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["visit"] = visit

        async def send_and_leave(message: Message) -> None:
            # A client that has the end of an answer may ask again at once: what the answer held
            # must be free by then.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                visit.close()
            await send(message)

        with visit:
            await self._app(scope, receive, send_and_leave)

    def _admit(self, scope: Scope) -> ApiKey:
        headers = Headers(scope=scope)
        if scope["path"] in OPEN_PATHS:
            return self._visitor(scope, headers)
        if self._keys is None:
            if self._hosts is not None and not self._hosts.know(headers.get("host")):
                raise misdirected(headers["host"])
            if not self._is_welcome(headers.get("origin")):
                raise forbidden(
                    "without API keys, web pages of other machines may not ask; start the server "
                    "with --cors-origin and the page's origin, or with --keys"
                )
            if scope["path"] == METRICS_PATH and not _is_loopback(scope["client"]):
                raise forbidden(
                    "without API keys, metrics are for clients on the server's machine; start it "
                    "with --keys, or ask from there"
                )
            return ANYONE
        token = _token(headers)
        if not token:
            raise unauthorized(
                "this server needs an API key; send it as Authorization: Bearer KEY", "missing"
            )
        key = self._keys.find(token)
        if key is None:
            raise unauthorized("the API key is not valid here, or was revoked", "invalid")
        return key

    def _visitor(self, scope: Scope, headers: Headers) -> ApiKey:
        """Whoever asks for what is open to all; what is told depends on who it is."""
        if self._keys is not None:
            token = _token(headers)
            return (self._keys.find(token) if token else None) or STRANGER
        known = self._hosts is None or self._hosts.know(headers.get("host"))
        if not known or not self._is_welcome(headers.get("origin")):
            return STRANGER
        return ANYONE if _is_loopback(scope["client"]) else GUEST

    def _is_welcome(self, origin: str | None) -> bool:
        """Whether a page of this origin may ask. Only browsers name one."""
        if origin is None or origin in self._origins or "*" in self._origins:
            return True
        try:
            host = urlsplit(origin).hostname or ""
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


def _token(headers: Headers) -> str:
    """The key that a request came with; empty where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _is_loopback(client: tuple[str, int] | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:  # a socket that has no addresses is on this machine, but whose?
        return False
