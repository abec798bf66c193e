"""Patterns of module names in adapters: the forms that PEFT writes, matched in linear time.

PEFT takes keys of ``rank_pattern`` and ``alpha_pattern`` for regular expressions that may begin at
any dot and must reach the end of a module's name. An adapter is a stranger's file, and a regular
expression can take longer than a server lives. These are parts of one: names, ``.`` and ``\\.``,
``.*``, ``\\d+`` and ``[0-9]+``, ``(a|b)`` of such names, and ``^`` at the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from sartor.errors import FormatError

_MOST_CHARS = 512
_PARTS = re.compile(
    r"(?P<some>\.\*)|(?P<any>\.)|(?P<digits>\\d\+|\[0-9\]\+)|(?P<dot>\\\.)"
    r"|\((?:\?:)?(?P<either>[\w.|-]*)\)|(?P<name>[\w-]+)"
)

Step = Callable[[str, set[int]], set[int]]
"""From the places in a name that the pattern has reached to those that it reaches next."""


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of PEFT is for a module. FormatError for one of another form."""
    anchored, steps = _compiled(pattern)
    reached = {0}
    if not anchored:
        reached |= {at + 1 for at, char in enumerate(module) if char == "."}
    for step in steps:
        reached = step(module, reached)
    return len(module) in reached


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> tuple[bool, tuple[Step, ...]]:
    if len(pattern) > _MOST_CHARS:
        raise FormatError(f"a pattern of {len(pattern)} characters is too long")
    at = int(pattern.startswith("^"))
    end = len(pattern) - pattern.endswith("$")
    steps: list[Step] = []
    while at < end:
        part = _PARTS.match(pattern, at, end)
        if part is None:
            raise FormatError(
                f"{pattern[at : at + 20]!r} is no part of a pattern that is read here; names, "
                "dots, '.*', '\\d+' and '(a|b)' are"
            )
        steps.append(_step(part))
        at = part.end()
    return pattern.startswith("^"), tuple(steps)


def _step(part: re.Match[str]) -> Step:
    match part.lastgroup:
        case "some":
            return lambda name, reached: (
                set(range(min(reached), len(name) + 1)) if reached else set()
            )
        case "any":
            return lambda name, reached: {at + 1 for at in reached if at < len(name)}
        case "digits":
            return _digits
        case "dot":
            return lambda name, reached: {at + 1 for at in reached if name.startswith(".", at)}
        case "name":
            return _either((part["name"],))
        case _:
            return _either(tuple(part["either"].split("|")))


def _digits(name: str, reached: set[int]) -> set[int]:
    found = set()
    for at in range(len(name)):
        if name[at].isdecimal() and (at in reached or at in found):
            found.add(at + 1)
    return found


def _either(words: tuple[str, ...]) -> Step:
    def step(name: str, reached: set[int]) -> set[int]:
        return {at + len(word) for at in reached for word in words if _is_at(name, at, word)}

    return step


def _is_at(name: str, at: int, word: str) -> bool:
    """A dot in a word is any character, as in a regular expression."""
    piece = name[at : at + len(word)]
    return len(piece) == len(word) and all(w in (".", c) for w, c in zip(word, piece, strict=True))
