"""The JSON files beside a checkpoint that say something of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sartor.errors import FormatError
from sartor.formats import small_files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if there is no such file."""
    try:
        content = small_files.parse_json(small_files.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {path}: {error}; download the checkpoint again") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object; download the checkpoint again")
    return content


def special_token(folder: Path, name: str) -> str | None:
    """The text of a token such as ``bos_token``, wherever the folder declares it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_json(folder / file).get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None
