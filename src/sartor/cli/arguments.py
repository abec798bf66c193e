"""Command lines, by the signatures of the functions that they call.

A parameter is annotated with an :class:`Argument` (by its place) or an :class:`Option` (by its
name). Libraries that do the same take longer to import than a model takes to load, and every
command would pay for it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.errors import UsageError

_WIDTH = 80
_TYPES: dict[type, tuple[str, str]] = {
    str: ("TEXT", "text"),
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    Path: ("PATH", "a path"),
}
"""What help and errors call the types that a value can have."""

Function = Callable[..., int | None]


@dataclass(frozen=True)
class Argument:
    """Given by its place; a list takes all that are left."""

    help: str
    metavar: str = ""


@dataclass(frozen=True)
class Option:
    """Given as ``--name VALUE`` or ``--name=VALUE``, a flag as ``--name``, a list several times.

    ``name`` is the parameter's where it is not stated; ``minimum`` is the least number allowed.
    """

    help: str
    name: str = ""
    metavar: str = ""
    minimum: int | None = None


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a command; ``flag`` is "" for an argument, ``kind`` the type of one value."""

    key: str
    flag: str
    metavar: str
    help: str
    kind: type
    many: bool
    required: bool
    default: object
    minimum: int | None

    def convert(self, text: str) -> object:
        shown = self.flag or self.metavar
        try:
            value = self.kind(text)
        except ValueError:
            raise UsageError(f"{shown} must be {_TYPES[self.kind][1]}, not {text!r}") from None
        if self.minimum is not None and value < self.minimum:
            raise UsageError(f"{shown} must be at least {self.minimum}, not {text}")
        return value


def call(program: str, function: Function, words: Sequence[str]) -> int:
    """Runs a command on the words of its line and returns its exit code; -h shows its help.

    UsageError for words that do not fit.
    """
    parameters = list(_parameters(function))
    try:
        values = _parse(parameters, words)
    except UsageError as error:
        raise UsageError(f"{error}; `{program} --help` tells more") from None
    if values is None:
        print(_help(program, function, parameters))
        return 0
    return function(**values) or 0


def near(word: str, known: Sequence[str]) -> str:
    """A hint at names that are spelled nearly like ``word``; "" where there are none."""
    import difflib

    found = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def summary(function: Function) -> str:
    """The first line of a command's description."""
    return (function.__doc__ or "").splitlines()[0]


def columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Indented names with their descriptions beside them."""
    from textwrap import wrap

    left = max(len(name) for name, _ in rows) + 4
    lines = []
    for name, text in rows:
        first, *more = wrap(text, _WIDTH - left) or [""]
        lines.append(f"  {name.ljust(left - 2)}{first}".rstrip())
        lines += [" " * left + line for line in more]
    return lines


def _parameters(function: Function) -> Iterator[_Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    for key, parameter in inspect.signature(function).parameters.items():
        hint, declared = typing.get_args(hints[key])
        variants = [v for v in typing.get_args(hint) if v is not type(None)]
        if typing.get_origin(hint) is not list and variants:
            (hint,) = variants  # `X | None`
        many = typing.get_origin(hint) is list
        kind = typing.get_args(hint)[0] if many else hint
        option = declared if isinstance(declared, Option) else None
        required = parameter.default is parameter.empty
        yield _Parameter(
            key=key,
            flag="" if option is None else option.name or "--" + key.replace("_", "-"),
            metavar=declared.metavar or (key.upper() if option is None else ""),
            help=declared.help,
            kind=kind,
            many=many,
            required=required,
            default=None if required else parameter.default,
            minimum=None if option is None else option.minimum,
        )


def _parse(parameters: Sequence[_Parameter], words: Sequence[str]) -> dict[str, Any] | None:
    """The values of the parameters that were given; None where help was asked for."""
    options = {p.flag: p for p in parameters if p.flag}
    values: dict[str, Any] = {}
    places: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            places += left
        elif word in ("-h", "--help"):
            return None
        elif not word.startswith("-") or word == "-":
            places.append(word)
        else:
            flag, sign, text = word.partition("=")
            option = options.get(flag)
            if option is None:
                raise UsageError(f"no such option: {flag}{near(flag, list(options))}")
            if option.kind is bool:
                if sign:
                    raise UsageError(f"{flag} takes no value")
                values[option.key] = True
                continue
            given = text if sign else next(left, None)
            if given is None:
                raise UsageError(f"{flag} needs a value")
            _put(values, option, given)
    for parameter in parameters:
        if parameter.flag:
            continue
        if parameter.required and not places:
            raise UsageError(f"{parameter.metavar} is missing")
        taken = len(places) if parameter.many else 1
        for word in places[:taken]:
            _put(values, parameter, word)
        places = places[taken:]
    if places:
        raise UsageError(f"one argument too many: {places[0]!r}")
    return values


def _put(values: dict[str, Any], parameter: _Parameter, text: str) -> None:
    value = parameter.convert(text)
    if parameter.many:
        values.setdefault(parameter.key, []).append(value)
    else:
        values[parameter.key] = value


def _help(program: str, function: Function, parameters: Sequence[_Parameter]) -> str:
    places = [p for p in parameters if not p.flag]
    usage = [p.metavar if p.required else f"[{p.metavar}]" for p in places]
    lines = [f"Usage: {' '.join([program, '[OPTIONS]', *usage])}", ""]
    lines += [
        f"  {line}".rstrip() for line in inspect.cleandoc(function.__doc__ or "").splitlines()
    ]
    if places:
        lines += ["", "Arguments:", *columns([(p.metavar, p.help) for p in places])]
    rows = [(_spelled(p), p.help + _shown_default(p)) for p in parameters if p.flag]
    rows.append(("-h, --help", "Show this message and exit."))
    return "\n".join([*lines, "", "Options:", *columns(rows)])


def _spelled(option: _Parameter) -> str:
    if option.kind is bool:
        return option.flag
    return f"{option.flag} {option.metavar or _TYPES[option.kind][0]}"


def _shown_default(option: _Parameter) -> str:
    shown = option.default is not None and option.kind is not bool
    return f" [default: {option.default}]" if shown else ""
