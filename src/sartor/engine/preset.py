"""A name for a way to talk with a model: a system prompt, and how its tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.graph.sampling import UNSAID, SamplingDefaults

_OPENERS = ("system", "developer")


@dataclass(frozen=True)
class Preset:
    """What a conversation gets that does not say it itself.

    model      as the command line takes it; empty: whatever the preset is used with
    system     the system prompt; None for none
    sampling   comes before the model's own values
    template   variables of the chat template, like ``enable_thinking``
    """

    name: str
    model: str = ""
    system: str | None = None
    sampling: SamplingDefaults = UNSAID
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chats(self) -> bool:
        """Whether it needs a chat template."""
        return self.system is not None or bool(self.template)

    def opened(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, behind the preset's system prompt where they have none of their own."""
        if self.system is None or any(m.get("role") in _OPENERS for m in messages):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]
