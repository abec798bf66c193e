"""From the bytes of a request to a typed one; whatever is wrong is a 4xx that says what."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from sartor.serving.errors import ApiError, invalid, unsupported
from sartor.serving.openai_types import (
    NEUTRAL,
    REFUSED,
    REFUSED_IN_MESSAGES,
    REFUSED_PARTS,
    REFUSED_ROLES,
)

B = TypeVar("B", bound=BaseModel)
MAX_BODY_BYTES = 8 * 2**20
_SHOWN = 80

# Parameters of several types: the list of what failed for each type helps nobody.
_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "input": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string, or a list of at most 16 strings, none of them empty",
    "logit_bias": "an object of token ids, as strings, with numbers from -100 to 100",
    "content": "a string, or a list of parts like {'type': 'text', 'text': '...'}",
}


async def read_body(request: Request) -> bytes:
    """The body of a request with JSON in it. ApiError 415 for another type, 413 when too long."""
    content_type = request.headers.get("content-type", "application/json")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise ApiError(
            415, f"the content type is {kind!r}; send JSON with Content-Type: application/json"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
    except ClientDisconnect:
        raise invalid("the client closed the connection before the body was complete") from None
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less")


def parse(kind: type[B], body: bytes) -> B:
    """The typed request. Raises ApiError 400 that names the parameter."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise invalid(f"the body must be a JSON object, but is a {type(data).__name__}")
    _refuse(data, kind)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise _explain(details[0]) from None


def _refuse(data: dict[str, Any], kind: type[BaseModel]) -> None:
    """Refuses what is known but not done yet, and drops it where it asks for nothing."""
    for name in REFUSED.keys() & data.keys():
        value = data.pop(name)
        if value is not None and value not in NEUTRAL.get(name, ()):
            raise unsupported(name, f"it asks for {REFUSED[name]}")
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _refuse_in_message(message, f"messages[{index}]")


def _refuse_in_message(message: dict[str, Any], where: str) -> None:
    if message.get("role") in REFUSED_ROLES:
        raise unsupported(f"{where}.role", f"{message['role']!r} belongs to tool calling")
    for name in REFUSED_IN_MESSAGES.keys() & message.keys():
        if message.pop(name) not in (None, []):
            raise unsupported(f"{where}.{name}", f"it holds {REFUSED_IN_MESSAGES[name]}")
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") in REFUSED_PARTS:
            raise unsupported(f"{where}.content[{index}]", f"it is a part of type {part['type']!r}")


def _explain(detail: ErrorDetails) -> ApiError:
    names = list(detail["loc"])
    for depth, name in enumerate(names):
        if name in _EXPECTED and depth + 1 < len(names):
            param = _spell(names[: depth + 1])
            return invalid(f"{param} must be {_EXPECTED[str(name)]}", param)
    param = _spell(names)
    if detail["type"] == "extra_forbidden":
        return invalid(f"the parameter {param!r} is unknown; remove it", param, "unknown_parameter")
    if detail["type"] == "missing":
        return invalid(f"the parameter {param!r} is missing", param, "missing_parameter")
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return invalid(f"{param} is {_show(detail['input'])}: {message}", param, "invalid_value")


def _spell(names: list[int | str]) -> str:
    text = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return text.removeprefix(".")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
