"""The small files beside weights: of a bounded size; JSON not nested deeply, of whole characters.

They come with a checkpoint, so from strangers. The limit is above the largest tokenizer.json that
is published (some 35 MB).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from sartor.errors import FormatError

MOST_BYTES = 64 << 20

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read(path: Path) -> bytes:
    """The content of a small file.

    Errors: :class:`FormatError` for what is longer than :data:`MOST_BYTES`, or no regular file;
    OSError as it is.
    """
    # Opening a pipe would wait for its writer.
    if path.exists() and not path.is_file():
        raise FormatError(f"{path}: not a regular file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise FormatError(
            f"{path}: larger than {MOST_BYTES >> 20} MiB, which no such file is; fetch it again"
        )
    return content


def parse_json(raw: bytes, *, twice: bool = True) -> object:
    """A JSON value; ``twice``: whether a key may appear twice in an object (the last one counts).

    ValueError where it is none, is nested too deeply, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=None if twice else _object)
        if _SURROGATE.search(raw):
            _check_text(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} appears twice")
    return found


def _check_text(value: object) -> None:
    """Half of a surrogate pair can be written in JSON, and nowhere else: not even in a message."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{value[:40]!a} holds half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key)
            _check_text(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner)
