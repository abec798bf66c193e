"""What was said in a chat, what of it the model still sees, and files that keep it."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import CapacityError, FormatError, SartorError, UsageError

if TYPE_CHECKING:
    from sartor.graph import SamplingParams

Message = dict[str, Any]
Encode = Callable[[Sequence[Message]], list[int]]

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "stop",
)
"""Sampling parameters that a chat sets, and that its files keep."""

RESERVE = 4
"""At most this part of the context is kept free for an answer: a quarter."""

MOST_BYTES = 64 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class Conversation:
    """Messages as in the OpenAI API, oldest first.

    system     the system prompt, None for none
    messages   all the others
    forgotten  so many of them, from the first on, the model does not see any more
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0

    def window(self) -> list[Message]:
        """What the model sees."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages[self.forgotten :]

    def everything(self) -> list[Message]:
        """What a file keeps."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages

    @property
    def turns(self) -> int:
        """Messages of the person."""
        return sum(message["role"] == "user" for message in self.messages)

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def clear(self) -> None:
        """Forgets all but the system prompt."""
        self.messages, self.forgotten = [], 0

    def undo(self) -> str | None:
        """Takes back the last message of the person and what came after it; returns its text."""
        for at in reversed(range(len(self.messages))):
            if self.messages[at]["role"] == "user":
                content = self.messages[at]["content"]
                del self.messages[at:]
                self.forgotten = min(self.forgotten, at)
                return content if isinstance(content, str) else ""
        return None

    def fit(self, encode: Encode, context: int, answer: int | None) -> tuple[list[int], int]:
        """The prompt's tokens, after the oldest turns have gone where the context is full.

        A turn is a message of the person with all that follows it. Some room is kept for the
        answer, ``answer`` tokens or a quarter of the context. Once turns have to go, they go until
        about half of the context is free: each time, the whole prompt has to be read again.
        Returns the tokens and how many turns went. CapacityError where the last message alone is
        too long.
        """
        room = context - min(answer or context, context // RESERVE)
        ids = encode(self.window())
        before, gone = self.forgotten, 0
        while (later := self._next_turn()) is not None and (len(ids) > room or gone):
            kept, self.forgotten = self.forgotten, later
            fewer = encode(self.window())
            if len(ids) <= room and len(fewer) < context // 2:
                self.forgotten = kept
                break
            ids = fewer
            gone += 1
        if len(ids) >= context:
            self.forgotten = before
            raise CapacityError(
                f"the message makes a prompt of {len(ids)} tokens, but prompt and answer together "
                f"can have {context}; shorten the prompt"
            )
        return ids, gone

    def _next_turn(self) -> int | None:
        """Where the turn after the oldest one that the model sees begins."""
        for at in range(self.forgotten + 1, len(self.messages)):
            if self.messages[at]["role"] == "user":
                return at
        return None


def save(
    path: Path, conversation: Conversation, model: str, params: SamplingParams, replace: bool
) -> None:
    """Writes a conversation as JSON. SartorError where that is not possible, or where there is such
    a file and ``replace`` is not set."""
    given = {name: getattr(params, name) for name in SAMPLING}
    content = {
        "model": model,
        "messages": conversation.everything(),
        "params": {name: value for name, value in given.items() if value not in (None, ())},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, default=list) + "\n"
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate; as an escape, JSON can hold it
        data = (json.dumps(content, indent=2, default=list) + "\n").encode()
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; name a file")
    if not replace and path.exists():
        raise UsageError(f"{path} is there already; /save -f {path} replaces it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            try:
                part.write(data)
                part.close()
                _as_others(part.name, path)
                os.replace(part.name, path)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise SartorError(f"{path} cannot be written: {error.strerror}") from None


def load(path: Path, params: SamplingParams) -> tuple[Conversation, SamplingParams, str | None]:
    """A conversation from a file that :func:`save` wrote, or that holds a list of messages.

    Returns it with the sampling parameters of the file over ``params``, and the name of the model
    that it was had with, where the file tells. SartorError says what is wrong.
    """
    found = _read(path)
    if isinstance(found, list):
        found = {"messages": found}
    if not isinstance(found, dict) or not isinstance(found.get("messages"), list):
        raise FormatError(f"{path} holds no conversation: no list of messages; name another file")
    messages = [_message(path, index, given) for index, given in enumerate(found["messages"])]
    system = None
    if messages and messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        system = messages.pop(0)["content"]
    given = found.get("params") or {}
    if not isinstance(given, dict):
        raise FormatError(f"{path}: params is a {type(given).__name__}, not an object; mend it")
    unknown = sorted(set(given) - set(SAMPLING))
    if unknown:
        raise FormatError(f"{path}: params has an unknown name, {unknown[0]!r}; remove it")
    model = found.get("model")
    try:
        params = changed(params, given)
    except UsageError as error:
        raise FormatError(f"{path}: params: {error}") from None
    return Conversation(system, messages), params, model if isinstance(model, str) else None


def changed(params: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """Parameters with some of them changed. UsageError names one whose value cannot be."""
    values = dict(values)
    stop = values.get("stop")
    if stop is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise UsageError("stop must be a text or a list of texts")
        values["stop"] = tuple(texts)
    for name in ("top_k", "seed", "max_tokens"):
        value = values.get(name)
        if value is not None and type(value) is not int:
            raise UsageError(f"{name} is {value!r}; it must be a whole number")
    return dataclasses.replace(params, **values)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SartorError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise FormatError(f"{path} is larger than {MOST_BYTES >> 20} MiB; it is no conversation")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not UTF-8 text, so it is no conversation") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


def _message(path: Path, index: int, given: Any) -> Message:
    role = given.get("role") if isinstance(given, dict) else None
    if role not in _ROLES:
        raise FormatError(
            f"{path}: message {index} has no role that there is; it must be one of "
            f"{', '.join(_ROLES)}"
        )
    content = given.get("content")
    if not isinstance(content, str | list):
        raise FormatError(f"{path}: message {index} has no content; it must be a text")
    return dict(given)


def _as_others(part: str, path: Path) -> None:
    """The rights of the file that is replaced, else those that new files have."""
    try:
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(part, mode)
