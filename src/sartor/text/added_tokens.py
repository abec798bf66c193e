"""Tokens that were added to a vocabulary, from the files beside it.

As transformers reads them: ``added_tokens_decoder`` of tokenizer_config.json where there is one,
else ``added_tokens.json``, whose tokens are special where another file names them so. They are
also read beside a tokenizer.json, over what it says of the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sartor.errors import FormatError
from sartor.text.control_tokens import END_OF_GENERATION
from sartor.text.folder_files import read_json
from sartor.text.sentencepiece import AddedPiece, Surroundings

_NAMED = ("bos_token", "eos_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def added_pieces(
    folder: Path,
    known: Mapping[str, AddedPiece],
    id_of: Callable[[str], int | None],
    notes: list[str],
) -> dict[str, AddedPiece]:
    """The added tokens by their text.

    ``known``: those of a tokenizer.json. ``id_of`` knows what the vocabulary has. FormatError where
    an entry has no text or no id. Special tokens that have an id nowhere get a line in ``notes``.
    """
    config = read_json(folder / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    named = dict(_named(config))
    if decoder:
        if not isinstance(decoder, Mapping):
            raise FormatError(f"added_tokens_decoder in {folder} must be an object")
        found = dict(known)
        found |= {
            text: AddedPiece(
                _id(key, folder),
                bool(entry.get("special", False)) or text in named or text in END_OF_GENERATION,
                _surroundings(entry),
                bool(entry.get("normalized", True)),
            )
            for key, entry in decoder.items()
            if (text := _text(entry, folder))
        }
    else:
        named |= dict(_named(read_json(folder / "special_tokens_map.json")))
        found = {}
        for text, key in read_json(folder / "added_tokens.json").items():
            special = text in named or text in END_OF_GENERATION
            how = named.get(text, Surroundings())
            found[text] = AddedPiece(_id(key, folder), special, how, normalized=not special)
        found |= known
    for text, how in named.items():
        if text in found:
            found[text] = dataclasses.replace(found[text], special=True)
        elif (token := id_of(text)) is not None:
            found[text] = AddedPiece(token, special=True, surroundings=how)
        else:
            notes.append(f"no file gives the special token {text!r} an id; it is read as text")
    return found


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, Surroundings]]:
    """The special tokens that a file names, with what they take of the text."""
    entries: list[Any] = [config.get(name) for name in _NAMED]
    for name in _LISTS:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = list(value.values())
        entries += value if isinstance(value, list) else []
    for entry in entries:
        if isinstance(entry, str):
            yield entry, Surroundings()
        elif isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
            yield entry["content"], _surroundings(entry)


def _surroundings(entry: Mapping[str, Any]) -> Surroundings:
    return Surroundings(
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        single_word=bool(entry.get("single_word", False)),
    )


def _text(entry: object, folder: Path) -> str:
    text = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(text, str) or not text:
        raise FormatError(
            f"added_tokens_decoder in {folder} holds {entry!r}; each entry must have a content"
        )
    return text


def _id(value: object, folder: Path) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise FormatError(f"an added token in {folder} has the id {value!r}, which is none")
    return value
