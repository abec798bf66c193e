"""Errors that reach a user.

A message names the thing, the cause and the next step, in one line. The command line prints
it without a traceback and exits with ``exit_code``; the server turns it into an API error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MOST_CHARS = 2000
"""Of a message: it may quote what stands in a file, which may be of any length."""


def _bounded(message: str) -> str:
    """The message without its middle where it is too long: the next step stands at its end."""
    if len(message) <= _MOST_CHARS:
        return message
    return f"{message[: _MOST_CHARS // 2]} [...] {message[-_MOST_CHARS // 4 :]}"


class SartorError(Exception):
    """Something failed that the user can understand and act on.

    ``fields`` are the parameters that the message names, as Python spells them ("max_context").
    ``advice`` is the next step for those who can take it: a text with {} where some fields go,
    such as ``("lower {}", ("state_bytes", "max_context"))``.
    """

    exit_code = 1

    def __init__(
        self,
        message: str = "",
        *,
        fields: tuple[str, ...] = (),
        advice: tuple[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(_bounded(message))
        self.fields = fields
        self.advice = advice

    def __str__(self) -> str:
        return self._whole(super().__str__(), {})

    def spelled(self, names: Mapping[str, str]) -> str:
        """The message as a caller reads it who writes these parameters otherwise: ``--context``
        for ``max_context``. Advice leaves out what ``names`` does not have."""
        message = super().__str__()
        planned = re.match(r"plan: (\w+)", message)
        if planned and planned[1] in names:  # whoever writes an option knows of no plan
            message = message.removeprefix("plan: ")
        for field in {*self.fields, *(planned.groups() if planned else ())}:
            if field in names:
                message = re.sub(rf"(?<![\w-]){field}\b", names[field], message)
        return self._whole(message, names)

    def _whole(self, message: str, names: Mapping[str, str]) -> str:
        if self.advice is None:
            return message
        step, fields = self.advice
        known = [names.get(field, "" if names else field) for field in fields]
        *others, last = [name for name in known if name] or [""]
        if not last:
            return f"{message}; free some memory, or choose a smaller model"
        listed = f"{', '.join(others)}{' or ' if others else ''}{last}"
        return f"{message}; {step.format(listed)}"


class UsageError(SartorError):
    """The call itself is wrong: an unknown name, a value out of range, a missing argument."""

    exit_code = 2


class FormatError(SartorError):
    """A file is damaged, truncated or not of the format that it claims to be."""


class UnsupportedError(SartorError):
    """The file is sound, but asks for something that is not implemented."""


class CapacityError(SartorError):
    """The request or model does not fit: memory, context length, queue."""
