"""Chat templates: Jinja2 programs that come with a checkpoint and write the prompt of a chat.

A template is somebody else's code. It runs in Jinja2's immutable sandbox, sees only plain data, and
in a process of its own that is limited and can be stopped (``template_process.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sartor.errors import FormatError, UsageError
from sartor.formats import small_files
from sartor.text.content_shape import (
    TOOL,
    Message,
    Shape,
    Shapes,
    TemplateStopped,
    shapes_in_chat,
    shapes_of_role,
    shows_calls,
)
from sartor.text.template_process import TemplateProcess

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two: OpenAI's Responses API
_MOST_ROLES = 64  # whose shapes are kept: callers may name any role
_GGUF_KEY = "tokenizer.chat_template"
_PLAIN = frozenset({Shape.TEXT})


@dataclass(frozen=True)
class ChatData:
    """What a request gives a template, as plain data.

    ``source``: the template that it is for. ``variables``: further names that the template uses.
    """

    source: str
    messages: list[Message]
    tools: list[Any] | None
    variables: dict[str, Any]
    add_generation_prompt: bool

    def given(self) -> list[Any]:
        """All that the request brings, about in the order in which templates write it."""
        return [self.tools, self.messages, list(self.variables.values())]

    def changed(self, change: Callable[[str], str]) -> ChatData:
        """The same with other strings, also those that are names in objects."""
        return replace(
            self,
            messages=_changed(self.messages, change),
            tools=_changed(self.tools, change),
            variables={name: _changed(value, change) for name, value in self.variables.items()},
        )


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(k, change): _changed(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    return value


class ChatTemplate:
    """A template, and the process that it runs in.

    ``source``: the template. ``tools_source``: the one to use when tools are given, for models that
    have two. ``variables``: further names that the template may use (other special tokens).
    ``fault``: why there is no template to use, for a model that has one and cannot chat with it;
    then ``source`` is not read. ``process``: one that has been started already.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        tools_source: str | None = None,
        variables: Mapping[str, str] | None = None,
        fault: str = "",
        process: TemplateProcess | None = None,
    ) -> None:
        self.source = source
        self.fault = fault
        self._tools_source = tools_source
        self._process = TemplateProcess() if process is None else process
        self._variables = {**(variables or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._shapes: dict[tuple[str, bool, str, bool], Shapes] = {}
        self._nothing: dict[tuple[str, bool], Message] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a chat; encode it with ``add_special=False``.

        ``messages`` as in the OpenAI API. Content goes to the template in a shape in which it shows
        the text of such messages (``content_shape``): a list of parts as it is, else its texts
        joined with newlines; a string as it is, else as one part. No content (missing, None or an
        empty list) is empty text. Arguments of tool calls that are JSON text are parsed, since
        templates write the JSON themselves. ``kwargs`` are further variables
        (``enable_thinking``, ``documents``, ...).

        UsageError if the messages are malformed, or the template shows their text in no shape,
        refuses them, fails, reaches for Python internals or takes too much time or memory.
        FormatError if the template has a syntax error.
        """
        data = self.read(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs
        )
        return self.write(data)

    def read(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> ChatData:
        """The arguments of :meth:`render` as :meth:`write` takes them. UsageError if they are
        malformed, or if the model cannot chat."""
        if taken := _RESERVED & kwargs.keys():
            raise UsageError(f"{', '.join(sorted(taken))} cannot be set as a template variable")
        source = self._tools_source if tools and self._tools_source is not None else self.source
        if self.fault and source is self.source:
            raise UsageError(f"{self.fault}; a plain prompt needs no template")
        return ChatData(
            source=source,
            messages=[_message(m, i) for i, m in enumerate(messages)],
            tools=plain_data(list(tools), "tools") if tools else None,
            variables=plain_data(kwargs, "the template variables"),
            add_generation_prompt=add_generation_prompt,
        )

    def write(self, data: ChatData) -> str:
        """The prompt for a chat; raises what :meth:`render` raises of a template."""
        variables = {
            "documents": None,
            **self._variables,
            **data.variables,
            "tools": data.tools,
            "add_generation_prompt": data.add_generation_prompt,
        }
        variables["messages"] = self._shaped(data.messages, data.source, variables)
        return self._process.render(data.source, variables)

    def _shaped(
        self, messages: list[Message], source: str, variables: Mapping[str, Any]
    ) -> list[Message]:
        """The messages, each content in a shape that the template shows."""
        render = partial(self._process.render, source)
        tools = bool(variables["tools"])
        # Without what one request sets: what is found out holds for all of them.
        usual: dict[str, Any] = {
            "documents": None,
            **self._variables,
            "tools": [TOOL] if tools else None,
            "add_generation_prompt": True,
        }
        shown: dict[str, frozenset[Shape]] = {}
        for role in dict.fromkeys(m["role"] for m in messages):
            lists = any(m["role"] == role and isinstance(m["content"], list) for m in messages)
            key = (source, tools, role, lists)
            if key not in self._shapes:
                if len(self._shapes) >= _MOST_ROLES:
                    self._shapes.clear()
                self._shapes[key] = shapes_of_role(role, render, usual, lists=lists)
            shown[role] = self._shapes[key].shown
        for role in [role for role, shapes in shown.items() if not shapes]:
            if not any(m["role"] == role and _has_text(m["content"]) for m in messages):
                continue
            # The probes were not what it expects: this chat decides.
            others = [
                m if m["role"] == role else _shape(m, shown[m["role"]] or _PLAIN) for m in messages
            ]
            found = shapes_in_chat(role, others, render, variables)
            if found.rendered and not found.shown:
                way_out = "" if role == "user" else "put it into a message of the user, or "
                raise UsageError(
                    f"the chat template does not show the text of messages with role {role!r}, "
                    f"neither of a string nor of a list of parts; {way_out}use a plain prompt"
                )
            shown[role] = found.shown
        nothing: Message | None = None
        shaped = []
        for message in messages:
            shapes = shown[message["role"]] or _PLAIN
            if _says_nothing_but_calls(message):
                if nothing is None:
                    nothing = self._no_content(source, tools, shapes, usual)
                shaped.append({**{k: v for k, v in message.items() if k != "content"}, **nothing})
            else:
                shaped.append(_shape(message, shapes))
        return shaped

    def _no_content(
        self, source: str, tools: bool, shapes: frozenset[Shape], usual: Mapping[str, Any]
    ) -> Message:
        """What stands for the content of an assistant that only calls tools.

        Some templates show the calls only where the content is None, or not there.
        """
        key = (source, tools)
        if key not in self._nothing:
            empty = _shape({"content": ""}, shapes)
            ways: list[Message] = [empty, {"content": None}, {}]
            render = partial(self._process.render, source)
            works = (way for way in ways if shows_calls(way, render, usual))
            self._nothing[key] = next(works, empty)
        return self._nothing[key]


def _message(message: object, index: int) -> Message:
    """One message as plain data, with content."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} must be an object, but is a {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{where} needs a role, a string such as 'user'")
    plain: Message = plain_data(message, where)
    content = plain.get("content")
    if isinstance(content, list):
        content = [_part(part, where) for part in content]
    plain["content"] = content if content is not None and content != [] else ""
    for call in plain.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue  # not JSON: the model wrote it, and the template may still show it
    return plain


def _part(part: object, where: str) -> Message:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise UsageError(
            f"{where} holds a part of type {kind!r}, but this model reads text only; send parts "
            "of type 'text'"
        )
    return {**part, "type": "text"} if kind in _TEXT_PARTS else part


def _has_text(content: object) -> bool:
    parts = content if isinstance(content, list) else [{"text": content}]
    return any(isinstance(part["text"], str) and part["text"].strip() for part in parts)


def _says_nothing_but_calls(message: Message) -> bool:
    return bool(
        message["role"] == "assistant"
        and message.get("tool_calls")
        and isinstance(message["content"], str)
        and not message["content"]
    )


def _shape(message: Message, shapes: frozenset[Shape]) -> Message:
    """The message with its content in one of these shapes."""
    content = message["content"]
    if isinstance(content, str) and Shape.TEXT not in shapes:
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list) and Shape.PARTS not in shapes and len(content) > 0:
        joined = "\n".join(part["text"] for part in content)
        content = joined if Shape.TEXT in shapes else [{"type": "text", "text": joined}]
    return {**message, "content": content}


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in plain JSON types: other objects carry methods that a template must not reach."""
    if depth > 64:
        raise UsageError(f"{where}: nested deeper than 64 levels")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {
            plain_data(k, where, depth + 1): plain_data(v, where, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_data(item, where, depth + 1) for item in value]
    raise UsageError(f"{where}: a value of type {type(value).__name__} is not JSON data")


def gguf_has_template(metadata: Mapping[str, object]) -> bool:
    """Whether there is anything that :func:`template_from_gguf` would read."""
    return any(key.startswith(_GGUF_KEY) for key in metadata)


def template_from_gguf(
    metadata: Mapping[str, object],
    notes: list[str] | None = None,
    process: TemplateProcess | None = None,
) -> ChatTemplate | None:
    """The template in a GGUF's metadata, or None: the model was not made for chat.

    There is deliberately no fallback: a chat format that the model has not seen gives poor answers
    without any sign of why. Callers refuse chat and offer plain completion. A template that cannot
    be used is one with a ``fault``, and a line in ``notes``. ``process`` renders it, if there is
    one already.
    """
    from sartor.text.gguf import Keys, named_token

    prefix = _GGUF_KEY
    named: dict[str, object] = {  # without a look at values: arrays are decoded when asked for
        key.removeprefix(prefix + "."): metadata[key]
        for key in metadata
        if key.startswith(prefix + ".")
    }
    if prefix in metadata:
        named["default"] = metadata[prefix]
    keys = Keys(metadata, notes)
    if not named:
        return None
    tokens = keys.strings("tokens")
    variables = {}
    for variable, name in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ):
        token = named_token(keys, tokens, name)
        variables[variable] = "" if token is None else tokens[token]
    return _chosen(named, prefix, variables, keys.notes, process)


def template_from_folder(
    folder: Path, notes: list[str] | None = None, process: TemplateProcess | None = None
) -> ChatTemplate | None:
    """The template of a checkpoint folder, or None (see ``template_from_gguf``).

    Looks, in the order of transformers, into ``chat_template.jinja``, ``chat_template.json`` and
    ``tokenizer_config.json``: one template, or several with names ("default", "tool_use") in a list
    or an object. Files of ``additional_chat_templates`` add to these by their names.
    """
    from sartor.text.folder_files import read_json, special_token

    folder = Path(folder)
    found: object = None
    file = folder / "chat_template.jinja"
    if file.is_file():
        found = _read(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if found is None:
            file = folder / name
            found = read_json(file).get("chat_template")
    named: dict[str, object] = {}
    if isinstance(found, list):
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    elif isinstance(found, Mapping):
        named = {str(name): template for name, template in found.items()}
    elif found is not None:
        named = {"default": found}
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = _read(extra)
    notes = [] if notes is None else notes
    if not named:
        if found is not None:
            notes.append(f"chat_template in {file.name} is empty: the model cannot chat")
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = {name: special_token(folder, name) or "" for name in names}
    return _chosen(named, f"chat_template in {file.name}", variables, notes, process)


def _read(file: Path) -> str:
    try:
        return small_files.read(file).decode("utf-8")
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {file}: {error}") from None


def _chosen(
    named: Mapping[str, object],
    where: str,
    tokens: dict[str, str],
    notes: list[str],
    process: TemplateProcess | None,
) -> ChatTemplate | None:
    """The template named "default", and the one for tools; what is wrong with them is in its fault
    and a note, for a model that cannot chat can still continue texts."""
    process = TemplateProcess() if process is None else process
    sources: dict[str, str] = {}
    faults: dict[str, str] = {}
    for name in ("default", "tool_use"):
        if name not in named:
            continue
        source = named[name]
        if not isinstance(source, str):
            faults[name] = f"{where} is not text"
        elif source.strip():
            try:
                process.check(source)
                sources[name] = source
            except (FormatError, TemplateStopped) as error:
                faults[name] = str(error)
    fault = faults.get("default", "")
    if not fault and "default" not in sources:
        others = sorted(name for name in named if name != "default")
        if not others:
            notes.append(f"{where} is empty: the model cannot chat")
            return None
        fault = f"{where} has no 'default', only {', '.join(map(repr, others))}"
    if fault:
        fault = f"the model cannot chat: {fault}"
        notes.append(fault)
    if "tool_use" in faults:
        notes.append(f"the template for chats with tools is not used: {faults['tool_use']}")
    return ChatTemplate(
        sources.get("default", ""),
        bos_token=tokens.pop("bos_token"),
        eos_token=tokens.pop("eos_token"),
        tools_source=sources.get("tool_use"),
        variables=tokens,
        fault=fault,
        process=process,
    )
