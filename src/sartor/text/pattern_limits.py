"""What a regular expression of a tokenizer.json may cost.

The expressions of pre-tokenizers and normalizers come with a checkpoint, and run on the texts of
requests. The ``tokenizers`` library runs them with Oniguruma, which backtracks: ``(a+)+$`` takes
time that doubles with each character. Oniguruma gives up a match after ten million steps, but it
begins a match at every character. So a bound is computed from the expression alone, in the syntax
that the library uses (Ruby's), and what exceeds it is refused by name.

The bound is ``factor * length ** degree`` steps for a match. Only what may have to be tried again
counts: a part behind which nothing can fail is taken at once. Expressions of published models are
of degree 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from sartor.errors import FormatError

MOST_CHARS = 16_384
"""Length of an expression. Compiling it takes memory and time for each of its classes."""

MOST_EXPRESSIONS = 64
MOST_DEGREE = 2
MOST_FACTOR = 1000
_MOST_DEPTH = 50
_NARROW = 4
"""Repetitions by which the ends of a quantifier may differ to count as a few choices."""

_MOST_QUANTIFIERS = 3
_UNBOUNDED = 1 << 30
_ADVICE = "write it with possessive quantifiers (a++) or atomic groups (?>...)"
_INTERVAL = re.compile(r"\{(\d{1,9})(,)?(\d{1,9})?\}|\{,(\d{1,9})\}")
_LONG_ESCAPE = re.compile(
    r"\\(?:[pP]\{[^{}]*\}|x\{[0-9a-fA-F ]*\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4})"
)
_OPTIONS = re.compile(r"\?([imasuWDSP]*(?:-[im]+)?)([:)])")
_NAME = re.compile(r"\?(?:<(\w+)>|'(\w+)')")
_ANCHORS = "AzZGbBK"


class CostlyPatternError(FormatError):
    """A regular expression that could take too long, or is of a form that is not looked into."""


@dataclass
class _Item:
    """One element of a sequence: what is repeated, and how often.

    ``body`` is None for one character. ``kind`` is ``plain``, ``atomic``, ``ahead`` or ``anchor``.
    """

    body: list[list[_Item]] | None = None
    kind: str = "plain"
    least: int = 1
    most: int = 1

    @property
    def varies(self) -> bool:
        return self.least != self.most


@dataclass(frozen=True)
class Cost:
    """Steps of a match, in the length of the text."""

    degree: int = 0
    factor: int = 1

    def __mul__(self, other: Cost) -> Cost:
        # A large factor is as bad as any: numbers must not grow without end.
        return Cost(self.degree + other.degree, min(self.factor * other.factor, _UNBOUNDED))


def check_patterns(part: object, where: str) -> None:
    """Looks at every expression in a part of a tokenizer, as JSON has it.

    Errors: :class:`CostlyPatternError` naming ``where`` and the expression.
    """
    expressions = list(_expressions(part))
    if len(expressions) > MOST_EXPRESSIONS:
        raise CostlyPatternError(
            f"{where}: {len(expressions)} regular expressions; at most {MOST_EXPRESSIONS} are used"
        )
    for expression in expressions:
        try:
            cost = cost_of(expression)
        except CostlyPatternError as error:
            raise CostlyPatternError(f"{where}: {error}") from None
        if cost.degree > MOST_DEGREE or cost.factor > MOST_FACTOR:
            raise CostlyPatternError(
                f"{where}: the regular expression {shown(expression)} could try a text in too many "
                f"ways; {_ADVICE}"
            )


def _expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex" and isinstance(inner, str):
                yield inner
            else:
                yield from _expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _expressions(inner)


def shown(expression: str) -> str:
    """An expression for a message."""
    return repr(expression if len(expression) <= 100 else f"{expression[:100]}...")


def cost_of(expression: str) -> Cost:
    """The bound of one match. CostlyPatternError for loops that can be taken apart in more than
    one way, and for forms whose cost is not known."""
    if len(expression) > MOST_CHARS:
        raise CostlyPatternError(
            f"a regular expression of {len(expression)} characters; at most {MOST_CHARS} are used"
        )
    parser = _Parser(expression)
    choices = parser.choices(0)
    if parser.at < len(expression):
        parser.refuse("')' without '('")
    return _of_choices(choices, False, expression)


@dataclass
class _Parser:
    text: str
    at: int = 0

    def refuse(self, reason: str) -> NoReturn:
        raise CostlyPatternError(
            f"the regular expression {shown(self.text)} is not used: {reason} at character "
            f"{self.at}"
        )

    def choices(self, depth: int) -> list[list[_Item]]:
        """Alternatives up to the end of the group."""
        if depth > _MOST_DEPTH:
            self.refuse("groups nested too deeply")
        found: list[list[_Item]] = [[]]
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                found.append([])
                continue
            item = self.item(depth)
            if item is not None:
                found[-1].append(self.quantified(item))
        return found

    def item(self, depth: int) -> _Item | None:
        char = self.text[self.at]
        if char == "(":
            self.at += 1
            return self.group(depth)
        if char == "[":
            self.character_class()
            return _Item()
        if char == "\\":
            return self.escape()
        self.at += 1
        return _Item(kind="anchor") if char in "^$" else _Item()

    def escape(self) -> _Item:
        long = _LONG_ESCAPE.match(self.text, self.at)
        if long is not None:
            self.at = long.end()
            return _Item()
        char = self.text[self.at + 1 : self.at + 2]
        if char in ("", *"kgXMCcyY", *"123456789"):
            self.refuse("a reference, or an escape whose length is not known,")
        self.at += 2
        return _Item(kind="anchor") if char in _ANCHORS else _Item()

    def group(self, depth: int) -> _Item | None:
        rest = self.text
        options, name = _OPTIONS.match(rest, self.at), _NAME.match(rest, self.at)
        kind = "plain"
        behind = False
        if options is not None:
            self.at = options.end()
            if options[2] == ")":
                return None
        elif name is not None:
            self.at = name.end()
        elif rest.startswith("?#", self.at):
            end = rest.find(")", self.at)
            if end < 0 or "\\" in rest[self.at : end]:
                self.refuse("a comment without an end")
            self.at = end + 1
            return None
        else:
            for start, of in (("?>", "atomic"), ("?=", "ahead"), ("?!", "ahead")):
                if rest.startswith(start, self.at):
                    self.at += 2
                    kind = of
                    break
            else:
                if rest.startswith(("?<=", "?<!"), self.at):
                    self.at += 3
                    kind, behind = "ahead", True
                elif rest.startswith(("?", "*"), self.at):
                    self.refuse("a group of another kind than (?:...), (?>...) and lookarounds")
        body = self.choices(depth + 1)
        if self.at >= len(rest):
            self.refuse("'(' without ')'")
        self.at += 1
        if behind and any(_has_choice([choice], loops=True) for choice in body):
            self.refuse("something of no fixed length to look behind for")
        return _Item(body, kind)

    def character_class(self) -> None:
        """Moves over a class; classes may stand in each other."""
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\\":
                long = _LONG_ESCAPE.match(self.text, self.at)
                self.at = self.at + 2 if long is None else long.end()
                continue
            self.at += 1
            if char == "[":
                depth += 1
                if self.text.startswith("^", self.at):
                    self.at += 1
                if self.text.startswith("]", self.at):
                    self.at += 1  # the first one is a character
            elif char == "]":
                depth -= 1
                if not depth:
                    return
        self.refuse("'[' without ']'")

    def quantified(self, item: _Item) -> _Item:
        """The item with the quantifiers that follow it; each further one repeats the whole."""
        count = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            interval = _INTERVAL.match(self.text, self.at) if char == "{" else None
            if char in "*+?":
                least, most = {"*": (0, _UNBOUNDED), "+": (1, _UNBOUNDED), "?": (0, 1)}[char]
                self.at += 1
            elif interval is not None:
                low, comma, high, only = interval.groups()
                least = int(low or 0)
                most = int(only or high or (_UNBOUNDED if comma else low))
                self.at = interval.end()
            else:
                return item
            count += 1
            if count > _MOST_QUANTIFIERS:
                self.refuse("a quantifier of quantifiers")
            if count > 1:
                item = _Item([[item]])
            item.least, item.most = least, max(least, most)
            # "{2,3}+" is no possessive quantifier, but another one.
            if interval is None and self.text.startswith("+", self.at):
                item = _Item([[item]], "atomic")
                self.at += 1
            elif self.text.startswith("?", self.at):
                self.at += 1
        return item


def _of_choices(choices: list[list[_Item]], live: bool, text: str) -> Cost:
    """The cost of alternatives; ``live``: what comes behind them may fail, so all are tried."""
    costs = [_of_sequence(choice, live, text) for choice in choices]
    degree = max(cost.degree for cost in costs)
    factor = max(cost.factor for cost in costs)
    return Cost(degree, factor * len(choices) if live else factor)


def _of_sequence(sequence: list[_Item], live: bool, text: str) -> Cost:
    cost = Cost()
    for item in reversed(sequence):
        cost = cost * _of_item(item, live, text)
        live = live or item.least > 0
    return cost


def _of_item(item: _Item, live: bool, text: str) -> Cost:
    if item.kind == "anchor":
        return Cost()
    width = item.most - item.least
    inner = Cost()
    if item.body is not None:
        again = item.kind == "plain" and (live or item.least > 1)
        inner = once = _of_choices(item.body, again, text)
        if again and item.most > 1 and _has_choice(item.body):
            if item.most > _NARROW:
                raise CostlyPatternError(
                    f"the regular expression {shown(text)} repeats a group that can match the same "
                    f"text in more than one way; {_ADVICE}"
                )
            for _ in range(1, item.most):
                inner = inner * once
        if inner.degree and item.most > _NARROW:
            inner = inner * Cost(1)  # at every repetition
    if not live or not width:
        return inner
    return inner * (Cost(1) if width > _NARROW else Cost(0, width + 1))


def _has_choice(choices: list[list[_Item]], loops: bool = False) -> bool:
    """Whether there is more than one way through; ``loops``: only loops count, atomic ones too."""
    if len(choices) > 1 and not loops:
        return True
    return any(_is_choice(item, loops) for choice in choices for item in choice)


def _is_choice(item: _Item, loops: bool) -> bool:
    if item.varies:
        return True
    if item.body is None or item.kind == "ahead" or (item.kind == "atomic" and not loops):
        return False
    return _has_choice(item.body, loops)
