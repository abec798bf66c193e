"""Chat templates: Jinja2 programs that come with a checkpoint and write the prompt of a chat.

A template is somebody else's code. It runs in Jinja2's immutable sandbox, sees only plain data, and
has a budget of loop steps and string sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sartor.errors import FormatError, UsageError

if TYPE_CHECKING:
    from sartor.text.template_sandbox import Program

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """A compiled template.

    ``source``: the template. ``tools_source``: the one to use when tools are given, for models that
    have two. ``variables``: further names that the template may use (other special tokens).
    FormatError if a template has a syntax error.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        tools_source: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        from sartor.text.template_sandbox import Program

        self.source = source
        self._program = Program(source)
        self._tools_program = Program(tools_source) if tools_source is not None else None
        self._variables = {**(variables or {}), "bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a chat; encode it with ``add_special=False``.

        ``messages`` as in the OpenAI API. Content that is a list of parts goes to the template as
        it is if the template handles lists; else its text parts are joined with newlines. Plain
        text becomes one part for a template that handles nothing but lists. Arguments of tool calls
        that are JSON text are parsed, since templates write the JSON themselves. ``kwargs`` are
        further variables (``enable_thinking``, ``documents``, ...).

        UsageError if the messages are malformed, or the template refuses them, fails, reaches for
        Python internals or exceeds its budget.
        """
        if taken := _RESERVED & kwargs.keys():
            raise UsageError(f"{', '.join(sorted(taken))} cannot be set as a template variable")
        program = self._tools_program if tools and self._tools_program else self._program
        variables = {
            "documents": None,
            **self._variables,
            **plain_data(kwargs, "the template variables"),
            "messages": [_message(m, i, program) for i, m in enumerate(messages)],
            "tools": plain_data(list(tools), "tools") if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        return program.render(variables)


def _message(message: object, index: int, program: Program) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} must be an object, but is a {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{where} needs a role, a string such as 'user'")
    plain: dict[str, Any] = plain_data(message, where)
    content = plain.get("content")
    if isinstance(content, list) and not program.takes_parts:
        plain["content"] = _flatten(content, where)
    elif isinstance(content, str) and not program.takes_text:
        plain["content"] = [{"type": "text", "text": content}]
    for call in plain.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue  # not JSON: the model wrote it, and the template may still show it
    return plain


def _flatten(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UsageError(
                f"{where} holds a part of type {kind!r}, but this model's chat template takes "
                "text only; send parts of type 'text'"
            )
        texts.append(part["text"])
    return "\n".join(texts)


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


def template_from_gguf(metadata: Mapping[str, object]) -> ChatTemplate | None:
    """The template in a GGUF's metadata, or None: the model was not made for chat.

    There is deliberately no fallback: a chat format that the model has not seen gives poor answers
    without any sign of why. Callers refuse chat and offer plain completion.
    """
    from sartor.text.gguf import Keys

    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise FormatError("tokenizer.chat_template must be a string")
    tools_source = metadata.get("tokenizer.chat_template.tool_use")
    if tools_source is not None and not isinstance(tools_source, str):
        raise FormatError("tokenizer.chat_template.tool_use must be a string")
    keys = Keys(metadata)
    tokens = keys.strings("tokens")
    variables = {}
    for variable, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        token = keys.token(key, len(tokens))
        variables[variable] = "" if token is None else tokens[token]
    return ChatTemplate(
        source,
        bos_token=variables.pop("bos_token"),
        eos_token=variables.pop("eos_token"),
        tools_source=tools_source,
        variables=variables,
    )


def template_from_folder(folder: Path) -> ChatTemplate | None:
    """The template of a checkpoint folder, or None (see ``template_from_gguf``).

    Looks, in the order of transformers, into ``chat_template.jinja``, ``chat_template.json`` and
    ``tokenizer_config.json`` (one template, or a list of named ones: "default", "tool_use").
    """
    from sartor.text.folder_files import read_json, special_token

    folder = Path(folder)
    found: object = None
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            found = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read {file}: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if found is None:
            file = folder / name
            found = read_json(file).get("chat_template")
    if found is None:
        return None
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    else:
        named = {"default": found}
    source, tools_source = named.get("default"), named.get("tool_use")
    if not isinstance(source, str) or not isinstance(tools_source, str | None):
        raise FormatError(f"chat_template in {file} must be a string or a list with a 'default'")
    variables = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        variables[name] = special_token(folder, name) or ""
    return ChatTemplate(
        source,
        bos_token=variables.pop("bos_token"),
        eos_token=variables.pop("eos_token"),
        tools_source=tools_source,
        variables=variables,
    )
