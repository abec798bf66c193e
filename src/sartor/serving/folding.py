"""A whole answer, put together from its deltas as they come.

Log probabilities are kept as the JSON that they will be: as objects they take several times the
memory, and an answer may have a million of them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import msgspec

from sartor.serving.answer import Answer, Delta
from sartor.serving.openai_format import Json, Shape, usage


@dataclass
class _Choice:
    text: io.StringIO = field(default_factory=io.StringIO)
    lists: dict[str, bytearray] = field(default_factory=dict)
    finish_reason: str | None = None


class Folding:
    """Takes the deltas of one answer in the shape of one endpoint.

    ``size`` is what they take in bytes, about; it only grows.
    """

    def __init__(self, shape: Shape) -> None:
        self.size = 0
        self._shape = shape
        self._choices: dict[int, _Choice] = {}

    def add(self, delta: Delta) -> None:
        index = self._shape.index(delta)
        choice = self._choices.setdefault(index, _Choice())
        text = delta.text
        choice.text.write(text)
        self.size += 4 * len(text)
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        for name, entries in (self._shape.chances(index, delta.logprobs) or {}).items():
            data = choice.lists.setdefault(name, bytearray())
            if entries:
                words = msgspec.json.encode(entries)
                data += b"," * bool(data) + words[1:-1]
                self.size += len(words)

    def finish(self, answer: Answer) -> Json:
        """The object to send; its lists are JSON already. Nothing can be added afterwards."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            lists: Json | None = {
                name: msgspec.Raw(b"[" + bytes(data) + b"]") for name, data in choice.lists.items()
            }
            text, end = choice.text.getvalue(), choice.finish_reason or "stop"
            choices.append(self._shape.choice(index, text, lists or None, end))
            choice.lists.clear()
        return {**self._shape.head(), "choices": choices, "usage": usage(answer)}
