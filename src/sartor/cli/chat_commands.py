"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.cli.conversation import SAMPLING, Conversation, Encode, changed, load, save
from sartor.cli.screen import say
from sartor.cli.terminal import remark, remark_facts
from sartor.errors import SartorError, UsageError

if TYPE_CHECKING:
    from sartor.cli.answer import Answer
    from sartor.cli.reading import Reader
    from sartor.graph import SamplingParams

SWITCHES = {
    "history": "keep what is typed for later chats",
    "markdown": "show Markdown as text with style",
    "stats": "tell the speed after each answer",
}
_WHOLE = ("top_k", "seed", "max_tokens")


class After(Enum):
    """What the chat does when a command is done."""

    READ = "read the next line"
    ANSWER = "answer the last message"
    LEAVE = "leave"


@dataclass
class ChatState:
    """What commands look at and change; ``given`` are the parameters that the chat began with."""

    model: str
    context: int
    conversation: Conversation
    params: SamplingParams
    encode: Encode
    reader: Reader
    switches: dict[str, bool]
    given: SamplingParams = field(init=False)
    answers: int = 0
    answer_tokens: int = 0
    last: Answer | None = None

    def __post_init__(self) -> None:
        self.given = self.params


@dataclass(frozen=True)
class Command:
    """``arguments`` as its help shows them."""

    run: Callable[[ChatState, str], After | None]
    arguments: str
    help: str


def execute(state: ChatState, line: str) -> After:
    """Runs a command. SartorError says in one line what is wrong, and changes nothing."""
    name, _, argument = line.strip().partition(" ")
    name = _SHORT.get(name.lower(), name.lower())
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        maybe = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"there is no command {name}; {maybe}/help lists them all (a message that begins with "
            f"a slash: /{name})"
        )
    if argument.strip() and not command.arguments:
        raise UsageError(f"{name} takes nothing after it; write it alone")
    return command.run(state, argument.strip()) or After.READ


def _help(state: ChatState, argument: str) -> None:
    del state, argument
    rows = [(f"{name} {c.arguments}".rstrip(), c.help) for name, c in COMMANDS.items()]
    rows += [
        ('"""', 'begin a message of several lines; """ ends it'),
        ("\\ at the end, Alt-Enter", "go on in a further line"),
        ("//...", "a message that begins with a slash"),
        ("Ctrl-C", "stop the answer, or empty the line; twice: leave"),
        ("Ctrl-D", "leave"),
    ]
    remark_facts(rows)


def _set(state: ChatState, argument: str) -> None:
    name, _, text = argument.partition(" ")
    name, text = name.replace("-", "_").lower(), text.strip()
    if not name:
        values = [(known, _shown(getattr(state.params, known))) for known in SAMPLING]
        values += [(known, "on" if on else "off") for known, on in state.switches.items()]
        remark_facts(values)
        return
    if name in SWITCHES:
        if text:
            if text not in ("on", "off"):
                raise UsageError(f"{name} is on or off, not {text!r}")
            state.switches[name] = text == "on"
            if name == "history":
                state.reader.keep_history(text == "on")
        remark(f"{name} is {'on' if state.switches[name] else 'off'}: {SWITCHES[name]}")
        return
    if name not in SAMPLING:
        near = difflib.get_close_matches(name, (*SAMPLING, *SWITCHES), 1, 0.5)
        maybe = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no {name} to set; {maybe}/set alone lists them")
    if text:
        state.params = changed(state.params, {name: _value(state, name, text)})
    remark(f"{name} is {_shown(getattr(state.params, name))}")


def _value(state: ChatState, name: str, text: str) -> Any:
    if text == "default":
        return getattr(state.given, name)
    if text == "none":
        return () if name == "stop" else None
    if name == "stop":
        try:
            texts = shlex.split(text)
        except ValueError:
            raise UsageError(f"stop: a quotation mark in {text!r} has no end; add it") from None
        return tuple(part.replace("\\n", "\n") for part in texts)
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise UsageError(f"{name} is {text!r}; it must be {kind}, none or default") from None


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    return shlex.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _system(state: ChatState, argument: str) -> None:
    conversation = state.conversation
    if argument:
        before = conversation.system
        conversation.system = None if argument in ('""', "''") else argument
        try:
            state.encode([*conversation.window()[:1], {"role": "user", "content": "hello"}])
        except SartorError:
            conversation.system = before
            raise
    if conversation.system is None:
        remark('there is no system prompt; /system TEXT sets one, /system "" removes it')
    else:
        say(f"system prompt: {conversation.system}")


def _save(state: ChatState, argument: str) -> None:
    replace = argument == "-f" or argument.startswith("-f ")
    path = _path("/save", argument.removeprefix("-f").strip() if replace else argument)
    if not state.conversation.messages:
        raise UsageError("nothing has been said that could be saved")
    save(path, state.conversation, state.model, state.params, replace)
    remark(f"saved {_count(len(state.conversation.everything()), 'message')} to {path}")


def _load(state: ChatState, argument: str) -> None:
    path = _path("/load", argument)
    conversation, params, model = load(path, state.params)
    try:
        tokens = len(state.encode(conversation.window()))
    except SartorError as error:
        raise UsageError(f"{path} does not go with this model's chat template: {error}") from None
    replaced = bool(state.conversation.messages)
    state.conversation, state.params = conversation, params
    said = f"loaded {_count(len(conversation.everything()), 'message')} ({tokens} tokens)"
    if model not in (None, state.model):
        said += f", of a chat with {model}"
    if replaced:
        said += ", in place of what was said before"
    if conversation.messages and conversation.messages[-1]["role"] == "user":
        said += "; the last has no answer yet: /retry makes one"
    remark(said)


def _path(command: str, text: str) -> Path:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise UsageError(f"{command} needs the name of a file")
    if "\0" in text:
        raise UsageError(f"{command}: a file's name has no zero byte")
    return Path(os.path.expanduser(text))


def _clear(state: ChatState, argument: str) -> None:
    del argument
    state.conversation.clear()
    remark("forgotten; the system prompt stays" if state.conversation.system else "forgotten")


def _undo(state: ChatState, argument: str) -> None:
    del argument
    text = state.conversation.undo()
    if text is None:
        raise UsageError("nothing has been said that could be taken back")
    first = " ".join(text.split())
    remark(f"taken back: {first[:50]}{'...' if len(first) > 50 else ''}")


def _retry(state: ChatState, argument: str) -> After:
    del argument
    messages = state.conversation.messages
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise UsageError("nothing has been said that could be answered")
    state.conversation.forgotten = min(state.conversation.forgotten, len(messages) - 1)
    return After.ANSWER


def _stats(state: ChatState, argument: str) -> None:
    del argument
    conversation = state.conversation
    used = len(state.encode(conversation.window())) if conversation.messages else 0
    share = f"{used / state.context:.0%}"
    rows = [
        ("model", state.model),
        ("context", f"{used} of {state.context} tokens ({share})"),
        ("turns", str(conversation.turns)),
        ("answers", f"{state.answers}, {state.answer_tokens} tokens"),
    ]
    if conversation.forgotten:
        rows.append(("forgotten", f"{_count(conversation.forgotten, 'message')}, the oldest"))
    if state.last is not None:
        rows.append(("last answer", state.last.speed()))
    remark_facts(rows)


def _leave(state: ChatState, argument: str) -> After:
    del state, argument
    return After.LEAVE


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


COMMANDS: dict[str, Command] = {
    "/help": Command(_help, "", "this list"),
    "/set": Command(_set, "[NAME [VALUE]]", "show or change how answers are made"),
    "/system": Command(_system, "[TEXT]", "show or set the system prompt"),
    "/stats": Command(_stats, "", "speed, tokens, and how full the context is"),
    "/retry": Command(_retry, "", "answer the last message again"),
    "/undo": Command(_undo, "", "take back the last message and its answer"),
    "/clear": Command(_clear, "", "forget what was said"),
    "/save": Command(_save, "[-f] FILE", "write the chat to a file; -f replaces one"),
    "/load": Command(_load, "FILE", "go on with a chat from a file"),
    "/exit": Command(_leave, "", "leave"),
}
_SHORT = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/q": "/exit"}

WORDS: dict[str, Sequence[str]] = {
    "": tuple(COMMANDS),
    "/set": (*SAMPLING, *SWITCHES),
    **{f"/set {name}": ("on", "off") for name in SWITCHES},
}
"""What Tab completes, by what stands before it."""
