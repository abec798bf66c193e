"""What each API takes, read from the types that requests are held to.

``python -m sartor.serving.parameters`` prints the tables of docs/serving.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from sartor.serving.openai_types import (
    NEUTRAL,
    NO_OPS,
    REFUSED,
    REFUSED_IN_MESSAGES,
    REFUSED_PARTS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ForModels,
    LoadAdapterRequest,
    Message,
    StreamOptions,
    TextPart,
    UnloadAdapterRequest,
)

Standing = Literal["honoured", "no-op", "refused", "unknown"]

APIS: dict[str, type[BaseModel]] = {
    "chat/completions": ChatRequest,
    "completions": CompletionRequest,
    "embeddings": EmbeddingRequest,
}
ADAPTER_APIS: dict[str, type[BaseModel]] = {
    "load_lora_adapter": LoadAdapterRequest,
    "unload_lora_adapter": UnloadAdapterRequest,
}
_NOTES = {
    "dimensions": "the first ones of each vector",
    "max_completion_tokens": "the newer name of max_tokens",
    "priority": "of vLLM: later than others of the same key",
    "cache_salt": "of vLLM: who has another one finds nothing of the prompt in the cache",
    "chat_template_kwargs": "of vLLM: variables for the model's template",
    "stream_options": "with stream; see below",
    "top_k": "of vLLM; -1 and 0 take all",
    "lora_path": "a folder below the server's adapter folder",
    "base_model_name": "needed where several models are served",
}


def standing(kind: type[BaseModel], name: str) -> Standing:
    """What becomes of a parameter of that name."""
    if name in kind.model_fields:
        return "no-op" if name in NO_OPS else "honoured"
    return "refused" if name in REFUSED and issubclass(kind, ForModels) else "unknown"


def parameter_table(apis: dict[str, type[BaseModel]]) -> Iterator[str]:
    """The lines of a Markdown table: parameters, what each API does with them, and what to know."""
    yield f"| parameter | {' | '.join(apis)} | |"
    yield f"|---|{'---|' * len(apis)}---|"
    names = dict.fromkeys(name for kind in apis.values() for name in kind.model_fields)
    for name in (*(n for n in names if n not in NO_OPS), *(n for n in names if n in NO_OPS)):
        yield _row(name, apis)
    if any(issubclass(kind, ForModels) for kind in apis.values()):
        for name in REFUSED:
            yield _row(name, apis)


def field_table() -> Iterator[str]:
    """The same for what is inside of parameters."""
    yield "| field | | |"
    yield "|---|---|---|"
    for where, kind in (
        ("messages[]", Message),
        ("messages[].content[]", TextPart),
        ("stream_options", StreamOptions),
    ):
        for name, described in kind.model_json_schema()["properties"].items():
            if name not in REFUSED_IN_MESSAGES:
                yield f"| `{where}.{name}` | honoured | {_values(described)} |"
    for name, what in REFUSED_IN_MESSAGES.items():
        yield f"| `messages[].{name}` | refused | {what}; taken: `[]` |"
    yield f"| parts of type {', '.join(REFUSED_PARTS)} | refused | |"
    yield "| others of messages and of their parts | ignored | the log says so once |"
    yield "| others of `stream_options` | refused | by name |"


def _row(name: str, apis: dict[str, type[BaseModel]]) -> str:
    found = [standing(kind, name) for kind in apis.values()]
    cells = " | ".join("-" if standing == "unknown" else standing for standing in found)
    return f"| `{name}` | {cells} | {_note(name, apis)} |"


def _note(name: str, apis: dict[str, type[BaseModel]]) -> str:
    if name in NO_OPS:
        return NO_OPS[name]
    if name in REFUSED:
        neutral = ", ".join(f"`{json.dumps(value)}`" for value in NEUTRAL.get(name, ()))
        return REFUSED[name] + (f"; taken: {neutral}" if neutral else "")
    kinds = [kind for kind in apis.values() if name in kind.model_fields]
    values = dict.fromkeys(_values(k.model_json_schema()["properties"][name]) for k in kinds)
    return "; ".join(part for part in (" or ".join(values), _NOTES.get(name, "")) if part)


def _values(described: dict[str, Any]) -> str:
    """What a JSON schema says of the values, in few words; null is taken wherever it may be
    left out."""
    options = [o for o in described.get("anyOf", [described]) if o.get("type") != "null"]
    words = dict.fromkeys(filter(None, map(_option, options)))
    return " or ".join(words)


def _option(option: dict[str, Any]) -> str:
    if "enum" in option:
        return " or ".join(map(str, option["enum"]))
    if "const" in option:
        return f"only {json.dumps(option['const'])}"
    kind = option.get("type", "")
    low, high = option.get("minimum"), option.get("maximum")
    if high is not None and high >= 2**31 - 1:  # what fits, and no limit that anybody meets
        high = None
    if low is not None and low <= -(2**31):
        low = None
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    if low is not None:
        return f"{kind} from {low:g} on"
    return str(kind)


def main() -> None:
    """Prints the tables."""
    for lines in (parameter_table(APIS), field_table(), parameter_table(ADAPTER_APIS)):
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
