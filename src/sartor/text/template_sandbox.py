"""The Jinja2 environment that chat templates run in.

Names and filters are those that transformers gives its templates (its documentation, "Writing a
chat template"). Apart from ``template.py``, so that Jinja2 is only imported where it is used.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sartor.errors import FormatError, UsageError
from sartor.text.content_shape import TemplateStopped

_MAX_STEPS = 250_000  # loop steps of one rendering; a chat of 1,000 messages takes a few thousand
_MAX_CHARS = 64_000_000  # of any string that a template builds

_steps: ContextVar[list[int]] = ContextVar("template_steps")


class _Limits(Extension):
    """What the rewritten template calls: see ``_rewrite``."""

    def step(self) -> str:
        counter = _steps.get()
        counter[0] += 1
        if counter[0] > _MAX_STEPS:
            raise SecurityError(f"it loops more than {_MAX_STEPS:,} times")
        return ""

    def concat(self, *parts: object) -> str:
        return _bounded("".join(map(str, parts)))


class _Generation(Extension):
    """``{% generation %}`` marks the model's own words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # Jinja2 itself would give an undefined value, which prints as nothing.
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
        elif operator == "**" and abs(right) > 64:
            raise SecurityError(f"it computes a power of {right}")
        result = super().call_binop(context, operator, left, right)
        return _bounded(result) if isinstance(result, str) else result


class _Namespace(Namespace):
    """Jinja2's namespace, without names that lead to Python internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named self, as in the base class: a template may well set a variable of that name.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"it sets the private name {name!r}")


def _bounded(text: str) -> str:
    _check_size(len(text))
    return text


def _check_size(size: int) -> None:
    if size > _MAX_CHARS:
        raise SecurityError(f"it builds a string of {size:,} characters")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models see it in training; Jinja2's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Limits, _Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
    )
    return environment


_ENVIRONMENT = _environment()


class Program:
    """One compiled template; FormatError if it has a syntax error."""

    def __init__(self, source: str) -> None:
        try:
            tree = _ENVIRONMENT.parse(source)
            _rewrite(tree)
            code = _ENVIRONMENT.compile(tree)
        except TemplateSyntaxError as error:
            raise FormatError(
                f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from None
        except RecursionError:
            raise FormatError("the chat template is nested too deeply") from None
        self._template = _ENVIRONMENT.template_class.from_code(
            _ENVIRONMENT, code, _ENVIRONMENT.make_globals(None)
        )

    def render(self, variables: dict[str, Any]) -> str:
        """The output; UsageError for whatever goes wrong, TemplateStopped at a limit."""
        token = _steps.set([0])
        try:
            parts: list[str] = []
            size = 0
            for part in self._template.generate(variables):
                size += len(part)
                _check_size(size)
                parts.append(part)
            return "".join(parts)
        except SecurityError as error:
            raise TemplateStopped(f"the chat template was stopped: {error}") from None
        except TemplateError as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from None
        except (MemoryError, RecursionError):
            raise TemplateStopped(
                "the chat template was stopped: it needs too much memory"
            ) from None
        except Exception as error:
            # Anything can go wrong in somebody else's program, and it must not take ours down.
            raise UsageError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}"
            ) from None
        finally:
            _steps.reset(token)


@lru_cache(maxsize=16)
def compiled(source: str) -> Program:
    """The program of a template; FormatError if it has a syntax error."""
    return Program(source)


def _rewrite(tree: nodes.Template) -> None:
    """Let every loop step and every ``~`` pass through ``_Limits``."""
    for loop in list(tree.find_all(nodes.For)):
        step = nodes.Call(nodes.ExtensionAttribute(_Limits.identifier, "step"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(step))
    for concat in list(tree.find_all(nodes.Concat)):
        # In place, because a node does not know its parent.
        limited = nodes.Call(
            nodes.ExtensionAttribute(_Limits.identifier, "concat"), concat.nodes, [], None, None
        )
        concat.nodes = [limited]
    tree.set_environment(_ENVIRONMENT)
