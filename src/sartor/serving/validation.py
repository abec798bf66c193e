"""From the bytes of a request to a typed one; whatever is wrong is a 4xx that says what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from sartor.serving.errors import ApiError, invalid, too_large, unsupported
from sartor.serving.limits import ServerLimits
from sartor.serving.openai_types import (
    NEUTRAL,
    REFUSED,
    REFUSED_IN_MESSAGES,
    REFUSED_PARTS,
    REFUSED_ROLES,
    RENAMED,
    ForModels,
    Message,
    TextPart,
)

B = TypeVar("B", bound=BaseModel)
_SHOWN = 80
_NEAR = 0.8
_MOST_UNKNOWN = 64
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[][{}]")

# Parameters of several types: the list of what failed for each type helps nobody.
_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "input": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string, or a list of at most 16 strings, none of them empty",
    "logit_bias": "an object of token ids, as strings, with numbers from -100 to 100",
    "content": "a string, or a list of parts like {'type': 'text', 'text': '...'}",
}


def parse(kind: type[B], body: bytes, limits: ServerLimits) -> B:
    """The typed request. Raises ApiError 400 that names the parameter."""
    _check_structure(body, limits)
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise invalid(f"the body must be a JSON object, but is a {type(data).__name__}")
    _refuse(data, kind)
    _check_sizes(data, limits)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise _explain(details[0]) from None


def _check_structure(body: bytes, limits: ServerLimits) -> None:
    """Refuses what would take long to parse, as cheaply as it can be told."""
    openers = body.count(b"[") + body.count(b"{")
    if openers + body.count(b",") <= limits.json_values and openers <= limits.json_depth:
        return
    bare = _STRING.sub(b"", body)  # what is in strings is no structure
    values = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if values > limits.json_values:
        raise ApiError(
            400,
            f"the body has {values} values, and the limit is {limits.json_values}; send fewer",
            code="limit_exceeded",
        )
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > limits.json_depth:
            raise ApiError(
                400,
                f"objects and lists in the body are more than {limits.json_depth} levels deep; "
                "send a flatter one",
                code="limit_exceeded",
            )


def _check_sizes(data: Mapping[str, Any], limits: ServerLimits) -> None:
    """Holds numbers and lengths to the limits, before every element is looked at."""
    for name, limit in (
        ("n", limits.choices),
        ("max_tokens", limits.max_tokens),
        ("max_completion_tokens", limits.max_tokens),
    ):
        value = data.get(name)
        if limit and isinstance(value, int | float) and value > limit:
            raise too_large(name, f"{value} is above this server's limit of {limit}; ask for less")
    for name, limit, what in (
        ("messages", limits.messages, "messages"),
        ("stop", limits.stop_strings, "stop strings"),
        ("logit_bias", limits.logit_biases, "biases"),
    ):
        value = data.get(name)
        if isinstance(value, list | dict) and len(value) > limit:
            raise too_large(name, f"{len(value)} {what}, and the limit is {limit}; send fewer")
    stop = data.get("stop")
    for index, text in enumerate(stop if isinstance(stop, list) else [stop]):
        if isinstance(text, str) and len(text) > limits.stop_chars:
            raise too_large(
                f"stop[{index}]" if isinstance(stop, list) else "stop",
                f"{len(text)} characters, and the limit is {limits.stop_chars}; send a shorter one",
            )
    for name in ("prompt", "input"):
        prompts = data.get(name)
        if not isinstance(prompts, list) or (prompts and isinstance(prompts[0], int | float)):
            continue
        if len(prompts) > limits.prompts:
            raise too_large(
                name, f"{len(prompts)} prompts, and the limit is {limits.prompts}; send fewer"
            )
        n = data.get("n")
        if isinstance(n, int | float) and len(prompts) * n > limits.sequences:
            raise too_large(
                name,
                f"{len(prompts)} prompts with n = {n} make {len(prompts) * n} answers, and the "
                f"limit is {limits.sequences}; ask for fewer",
            )


def _refuse(data: dict[str, Any], kind: type[BaseModel]) -> None:
    """Refuses what is unknown, and what is known but not done yet; drops the latter where it
    asks for nothing."""
    known = REFUSED.keys() if issubclass(kind, ForModels) else set[str]()
    for name in known & data.keys():
        value = data.pop(name)
        if value is not None and value not in NEUTRAL.get(name, ()):
            raise unsupported(name, f"it asks for {REFUSED[name]}")
    # Not left to the types: a list of all that is unknown may be a long one.
    for name in data:
        if name not in kind.model_fields:
            raise _unknown(name, kind)
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
    _check_fields(message, Message, where)
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, dict):
            continue
        if part.get("type") in REFUSED_PARTS:
            raise unsupported(f"{where}.content[{index}]", f"it is a part of type {part['type']!r}")
        _check_fields(part, TextPart, f"{where}.content[{index}]")


def _check_fields(given: Mapping[str, Any], kind: type[BaseModel], where: str) -> None:
    """Clients send back fields of earlier answers that nobody here knows, but not that many."""
    unknown = len(given.keys() - kind.model_fields.keys())
    if unknown > _MOST_UNKNOWN:
        raise too_large(
            where, f"{unknown} unknown fields, and the limit is {_MOST_UNKNOWN}; send fewer"
        )


def _explain(detail: ErrorDetails) -> ApiError:
    names = list(detail["loc"])
    for depth, name in enumerate(names):
        if name in _EXPECTED and depth + 1 < len(names):
            param = _spell(names[: depth + 1])
            return invalid(f"{param} must be {_EXPECTED[str(name)]}", param)
    param = _spell(names)
    if detail["type"] == "extra_forbidden":
        return _unknown(param)
    if detail["type"] == "missing":
        return invalid(f"the parameter {param!r} is missing", param, "missing_parameter")
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return invalid(f"{param} is {_show(detail['input'])}: {message}", param, "invalid_value")


def _unknown(name: str, kind: type[BaseModel] | None = None) -> ApiError:
    shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
    meant = "" if kind is None else _meant(shown, kind)
    hint = f"did you mean {meant!r}?" if meant else "remove it"
    return invalid(f"the parameter {shown!r} is unknown; {hint}", shown, "unknown_parameter")


def _meant(name: str, kind: type[BaseModel]) -> str:
    """The parameter that another name was probably meant to be, or nothing."""
    if RENAMED.get(name) in kind.model_fields:
        return RENAMED[name]
    near = difflib.get_close_matches(name.lower(), kind.model_fields, 1, _NEAR)
    return near[0] if near else ""


def _spell(names: list[int | str]) -> str:
    text = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return text.removeprefix(".")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
