"""In which shapes a chat template shows the text of a message.

Content is a string, or a list of parts. Templates reach it by filters, loops, slices, macros and
tests, and what they do not expect they leave out without a word. So this is not read off the
template's syntax: messages with a mark in their text are rendered, and the output says whether it
came out, as text and not as a printed list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sartor.errors import UsageError

Message = dict[str, Any]
Render = Callable[[dict[str, Any]], str]
"""Variables in, text out, both plain data; UsageError where the template refuses or fails."""


class TemplateStopped(UsageError):
    """A template went beyond what it may do or take; no use in asking it again."""


FIRST, SECOND = "wq7zfirst", "wq7zsecond"  # no template has these words, and no filter cuts them
_CANARY = "wq7zcanary"  # comes out only where a part is printed as data
_AS_LIST = re.compile(rf"""[\[,]\s*u?['"]a ({FIRST}|{SECOND})""")

_CALL = {
    "id": "abcdefghi",  # of the form that Mistral's templates insist on
    "type": "function",
    "function": {"name": "lookup", "arguments": {"key": "x"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What to look up."}},
            "required": ["key"],
        },
    },
}
"""A tool for probes: templates may look at all of its fields."""


class Shape(Enum):
    """``PART`` is a list of exactly one part: some templates look at the first only."""

    TEXT = "text"
    PARTS = "parts"
    PART = "part"


@dataclass(frozen=True)
class Shapes:
    """The shapes that are shown; ``rendered``: whether any probe came as far as an output."""

    shown: frozenset[Shape]
    rendered: bool


# Roles before and behind the probed message (*). Templates ask for alternation, for a user, or
# show the last message only; it is enough that one of these shows the mark.
_USUAL = {
    "system": ("*", "user"),
    "assistant": ("user", "*", "user"),
    "tool": ("user", "call", "*"),
}
_CONTEXTS: tuple[tuple[str, ...], ...] = (
    ("*",),
    ("user", "*"),
    ("*", "user"),
    ("user", "*", "user"),
    ("user", "assistant", "*"),
    ("user", "call", "*"),
    ("system", "*"),
    ("system", "user", "*"),
)


def shapes_of_role(
    role: str, render: Render, variables: Mapping[str, Any], *, lists: bool = True
) -> Shapes:
    """The shapes in which messages of one role are shown.

    ``variables``: all of the template's but ``messages``. Without ``lists``, where nobody has
    content in parts, lists are only tried where strings do not do. Raises TemplateStopped.
    """

    def chats(shape: Shape) -> Iterator[list[Message]]:
        usual = _USUAL.get(role, ("*",))
        for context in (usual, *(c for c in _CONTEXTS if c != usual)):
            for other in (shape, Shape.PART if shape is Shape.TEXT else Shape.TEXT):
                yield [_filler(name, role, shape, other) for name in context]

    return _shapes(chats, render, variables, lists=lists)


def shapes_in_chat(
    role: str, messages: Sequence[Message], render: Render, variables: Mapping[str, Any]
) -> Shapes:
    """The same, with a chat of its own as the only context."""

    def chats(shape: Shape) -> Iterator[list[Message]]:
        yield [
            {**m, "content": _marked(shape)} if m["role"] == role and m.get("content") else m
            for m in messages
        ]

    return _shapes(chats, render, variables)


def shows_calls(content: Message, render: Render, variables: Mapping[str, Any]) -> bool:
    """Whether the tool calls of an assistant that says nothing are shown.

    ``content`` is what stands for nothing in the message: a key with its value, or no key.
    """
    call = {**_CALL, "function": {"name": FIRST, "arguments": {"key": "x"}}}
    calls: Message = {"role": "assistant", **content, "tool_calls": [call]}
    user = _filler("user", "", Shape.TEXT, Shape.TEXT)
    result = {**user, "role": "tool", "name": "lookup", "tool_call_id": call["id"]}
    for chat in ([user, calls, result], [user, calls]):
        try:
            output = render({**variables, "messages": chat})
        except TemplateStopped:
            raise
        except UsageError:
            continue
        if FIRST in output and "None" not in output:
            return True
    return False


def _shapes(
    chats: Callable[[Shape], Iterator[list[Message]]],
    render: Render,
    variables: Mapping[str, Any],
    *,
    lists: bool = True,
) -> Shapes:
    rendered = False
    times: dict[Shape, int] = {}
    for shape in Shape:
        if shape is Shape.PART and Shape.PARTS in times:
            times[shape] = times[Shape.PARTS]
            continue
        for messages in chats(shape):
            try:
                output = render({**variables, "messages": messages})
            except TemplateStopped:  # each further probe would take as much as this one
                raise
            except UsageError:
                continue
            rendered = True
            count = _count(output, shape)
            if count:
                times[shape] = min(count, times.get(shape, count))
            if count == 1:
                break
        if times.get(Shape.TEXT) == 1 and not lists:
            break  # no other shape can be shown less often
    # What is shown twice in one shape and once in another is not meant to be in the first.
    least = min(times.values(), default=0)
    return Shapes(frozenset(s for s, count in times.items() if count == least), rendered)


def _count(output: str, shape: Shape) -> int:
    """How often the marks came out as text."""
    output = output.lower()
    if shape is Shape.TEXT:
        return output.count(FIRST)
    if _CANARY in output or _AS_LIST.search(output):
        return 0
    marks = (FIRST, SECOND) if shape is Shape.PARTS else (FIRST,)
    return min(output.count(mark) for mark in marks)


def _marked(shape: Shape) -> object:
    if shape is Shape.TEXT:
        return f"a {FIRST} z"
    marks = (FIRST, SECOND) if shape is Shape.PARTS else (FIRST,)
    return [{"type": "text", "text": f"a {mark} z", _CANARY: _CANARY} for mark in marks]


def _filler(name: str, role: str, shape: Shape, other: Shape) -> Message:
    """One message of a context; ``other`` is the shape of those that are not probed."""
    if name == "*":
        call = {"name": "lookup", "tool_call_id": _CALL["id"]} if role == "tool" else {}
        return {"role": role, "content": _marked(shape), **call}
    if name == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    content = "x" if other is Shape.TEXT else [{"type": "text", "text": "x"}]
    return {"role": name, "content": content}
