"""A reader for ``tokenizer.model``: the few protobuf fields of a SentencePiece model we need.

Field numbers: ``sentencepiece_model.proto``; wire format: the Protocol Buffers encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sartor.errors import FormatError
from sartor.formats import small_files
from sartor.text.sentencepiece import TokenType

_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

Value = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces, their scores and types by id, and the settings that encoding depends on."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    algorithm: str
    unknown_id: int | None
    bos_id: int | None
    eos_id: int | None
    space_prefix: bool
    remove_extra_spaces: bool
    charsmap: bytes


def read_model(path: Path) -> SentencePieceModel:
    """Read a model file; FormatError if it is not one."""
    try:
        return _parse(small_files.read(path))
    except (OSError, IndexError, ValueError, struct.error) as error:
        raise FormatError(
            f"{path} is not a SentencePiece model or is damaged ({error}); download it again"
        ) from None


def _parse(data: bytes) -> SentencePieceModel:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_bytes(piece.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(int(piece.get(3, TokenType.NORMAL)))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not tokens:
        raise ValueError("it has no pieces")

    def token_id(field: int, default: int) -> int | None:
        token = int(trainer.get(field, default))
        return token if token < len(tokens) else None  # -1 is stored as a huge unsigned number

    return SentencePieceModel(
        tokens=tokens,
        scores=scores,
        types=types,
        algorithm=_ALGORITHMS.get(int(trainer.get(3, 1)), "unknown"),
        unknown_id=token_id(40, 0),
        bos_id=token_id(41, 1),
        eos_id=token_id(42, 2),
        space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        charsmap=_bytes(normalizer.get(2, b"")),
    )


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has the wrong wire type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Field numbers and raw values of one message, in file order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: Value
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {at}")
            if at + size > len(data):
                raise ValueError("it ends in the middle of a field")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"an overlong number at byte {at}")
