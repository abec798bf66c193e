"""Errors as the OpenAI API shapes them: status, message, type, param, code."""

from __future__ import annotations

import math
from typing import Any, Literal

from starlette.responses import JSONResponse

from sartor.errors import SartorError


class ApiError(SartorError):
    """An answer that is an error. ``retry_after`` seconds goes out as the header of that name, and
    so does ``accept_encoding``; ``challenge`` goes out as WWW-Authenticate. One that ``closes`` is
    the last on its connection. ``tokens`` of the request were made before it was refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        challenge: str | None = None,
        accept_encoding: str | None = None,
        closes: bool = False,
        tokens: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.challenge = challenge
        self.accept_encoding = accept_encoding
        self.closes = closes
        self.tokens = tokens

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled by their positional arguments; one may come from another process.
        named = {name: getattr(self, name) for name in _NAMED}
        return _remake, (self.status, self.message, named)

    def body(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.challenge is not None:
            headers["WWW-Authenticate"] = self.challenge
        if self.accept_encoding is not None:
            headers["Accept-Encoding"] = self.accept_encoding
        if self.closes:
            headers["Connection"] = "close"
        return headers


_NAMED = (
    *("type", "param", "code", "retry_after", "challenge", "accept_encoding", "closes", "tokens"),
)


def _remake(status: int, message: str, named: dict[str, Any]) -> ApiError:
    return ApiError(status, message, **named)


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers())


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    return ApiError(
        400, f"{param}: {what}, which is not supported yet", param=param, code="unsupported"
    )


def model_not_found(name: str, known: list[str]) -> ApiError:
    others = f"served are {', '.join(known)}" if known else "no model is, to this key"
    return ApiError(
        404,
        f"the model {name[:256]!r} is not served here; {others}",
        param="model",
        code="model_not_found",
    )


def context_exceeded(
    prompt: int, context: int, param: str, limit: str = "", *, at_least: bool = False
) -> ApiError:
    """``limit``: what states the longest text of a model that makes vectors; empty for others.
    ``at_least``: the prompt has more tokens than were counted."""
    # Clients tell this error from others by the words "this model's maximum context length is".
    what, why = "prompt", ", which must hold at least one token of the answer too"
    if limit:
        what, why = "text", f" ({limit})"
    return ApiError(
        400,
        f"the {what} has {'at least ' * at_least}{prompt} tokens, but this model's maximum context "
        f"length is {context} tokens{why}; shorten the {what}",
        param=param,
        code="context_length_exceeded",
        tokens=prompt,
    )


def unauthorized(message: str, problem: Literal["missing", "invalid"]) -> ApiError:
    """RFC 6750: a request without a key is told how to send one, and no error besides.

    Clients that go by the type (LiteLLM) would take "invalid_request_error" for a wrong request.
    """
    challenge = 'Bearer realm="sartor"'
    if problem == "invalid":
        challenge += ', error="invalid_token"'
    return ApiError(
        401,
        message,
        type="authentication_error",
        code=f"{problem}_api_key",
        challenge=challenge,
    )


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="forbidden")


def too_large(param: str, message: str) -> ApiError:
    """A number in a request is above a limit of this server, which ``message`` names."""
    return ApiError(400, f"{param}: {message}", param=param, code="limit_exceeded")


def rate_limited(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code=code, retry_after=retry_after)


def holds_its_part(key: str, what: str) -> ApiError:
    """One key has as much of what all share as one key may have."""
    return rate_limited(
        f"the key {key} holds its part of what all keys share: {what}; wait for one of its "
        "requests to end",
        "key_share",
        retry_after=1,
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} s, the server's limit for a request "
        "(--max-seconds); ask for fewer tokens",
        type="timeout_error",
        code="request_timeout",
    )


def overloaded(limit: int) -> ApiError:
    return rate_limited(
        f"the server has its fill of {limit} unfinished requests; try again in a moment",
        "queue_full",
        retry_after=1,
    )


def answers_full(size: int, limit: int) -> ApiError:
    """Answers that nobody has taken fill the memory for them, and this is the largest."""
    error = unavailable(
        f"answers that wait to be taken fill the {limit} bytes that the server has for them, and "
        f"this one was the largest of its key ({size} bytes); read streams faster, or ask for "
        "fewer tokens, choices or log probabilities",
        retry_after=1,
    )
    error.code = "answers_full"
    return error


def too_long_a_queue(seconds: float, limit: float) -> ApiError:
    return rate_limited(
        f"a request that comes now would wait about {seconds:.0f} s for its first token, and the "
        f"server lets none wait longer than {limit:g} s; try again later",
        "queue_too_long",
        retry_after=max(1, math.ceil(seconds - limit)),
    )


def unavailable(message: str, retry_after: int | None = None) -> ApiError:
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code="service_unavailable",
        retry_after=retry_after,
    )


def given_up(message: str) -> ApiError:
    """The request is what workers die of."""
    return ApiError(500, message, type="server_error", code="request_given_up")


def internal(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")
