"""Seeded changes of files: of any bytes, and of the headers that the formats begin with.

A changed header gets the length and the digest that belong to it, so that the checks behind these
are reached. Every function takes a ``random.Random`` and gives the same bytes for the same state.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 4095, 4096),
    *(2**15, 2**16 - 1, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**48, 2**53),
    *(2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Integers at which sizes and signs change."""

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        -(2**31),
        -(2**63),
        2**64,
        2**80,
        10**400,
        0.0,
        -0.5,
        1.5,
        1e30,
        1e308,
    ),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "\0", "../x", "é\ud800", "F32", "uint8"),
    *("a" * 5000, [], {}, [[]], [0], [-1], [1] * 40, [2**60, 2**60], {"a": {"b": []}}, ["x", None]),
)
"""JSON values of every kind, and of sizes that nothing has."""


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits are others."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def numbered(data: bytes, rng: random.Random) -> bytes:
    """One number of 1, 2, 4 or 8 bytes at an aligned place is another."""
    size = rng.choice((1, 2, 4, 8))
    if len(data) < size:
        return data
    at = rng.randrange(0, len(data) - size + 1) // size * size
    return with_number(data, at, size, rng)


def with_number(data: bytes, at: int, size: int, rng: random.Random) -> bytes:
    """The number at a place is one of :data:`NUMBERS`, or one more or less than it was."""
    now = int.from_bytes(data[at : at + size], "little")
    value = rng.choice((now + 1, now - 1, now * 2, *NUMBERS)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def duplicated(data: bytes, rng: random.Random) -> bytes:
    """A piece stands twice, somewhere."""
    begin = rng.randrange(len(data))
    piece = data[begin : begin + rng.choice((1, 8, 64, 512))]
    at = rng.randrange(len(data))
    return data[:at] + piece + data[at:]


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A piece is written over another place."""
    begin, at = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[begin : begin + rng.choice((1, 8, 64, 512))]
    return data[:at] + piece + data[at + len(piece) :]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 4, 8, 64)) :]


_ANY = (flipped, numbered, truncated, duplicated, spliced, cut_out)


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes that know nothing of the format."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_ANY)(data, rng) or data
    return data


def any_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to four changes somewhere in it."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        _change_json(value, rng)
    return value


def _change_json(value: Any, rng: random.Random) -> None:
    place, keys = value, _keys(value)
    while keys:
        key = rng.choice(keys)
        inner = _keys(place[key])
        if not inner or rng.random() < 0.15:
            break
        place, keys = place[key], inner
    if not keys:
        return
    kind = rng.random()
    other = rng.choice(keys)
    if kind < 0.12:
        del place[key]
    elif kind < 0.22:
        place[key], place[other] = place[other], place[key]
    elif kind < 0.32:
        place[key] = copy.deepcopy(place[other])
    elif kind < 0.40 and isinstance(place, dict):
        place[rng.choice(("x", "", "a\0b", f"{key}2", str(other)))] = copy.deepcopy(place[key])
    elif kind < 0.45:
        place[key] = [place[key]] if rng.random() < 0.5 else {"x": place[key]}
    elif kind < 0.70 and isinstance(place[key], int):
        place[key] = rng.choice((*NUMBERS, place[key] + 1, place[key] - 1, -place[key]))
    elif kind < 0.70 and isinstance(place[key], str) and place[key]:
        text: str = place[key]
        at = rng.randrange(len(text))
        place[key] = text[:at] + rng.choice(("", "\0", "z", "(", "\u2581", "9")) + text[at + 1 :]
    else:
        place[key] = copy.deepcopy(rng.choice(VALUES))


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def json_bytes(value: Any) -> bytes:
    """As text, lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_file(data: bytes, rng: random.Random) -> bytes:
    """A JSON file: other values in it, or other bytes."""
    kind = rng.random()
    if kind < 0.03:
        return rng.choice((b"[", b'{"a":')) * 100_000
    if kind < 0.2:
        return any_bytes(data, rng)
    return json_bytes(any_json(json.loads(data), rng))


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file: another header, mostly of the length that is stated."""
    if rng.random() < 0.2:
        return any_bytes(data, rng)
    (length,) = struct.unpack_from("<Q", data)
    raw = json_bytes(any_json(json.loads(data[8 : 8 + length]), rng))
    if rng.random() < 0.2:
        raw = any_bytes(raw, rng)
    stated = len(raw) if rng.random() < 0.9 else rng.choice(NUMBERS)
    rest = data[8 + length :] if rng.random() < 0.9 else any_bytes(data[8 + length :], rng)
    return struct.pack("<Q", stated) + raw + rest


_PREAMBLE = struct.Struct("<8sIIQQ32s")


def packed(data: bytes, rng: random.Random) -> bytes:
    """A packed file: another header with the digest that belongs to it."""
    kind = rng.random()
    if kind < 0.1:
        return any_bytes(data, rng)
    if kind < 0.2:  # the preamble; the header with its digest stays
        return with_number(data, 8 + 4 * rng.randrange(5), rng.choice((4, 8)), rng)
    magic, version, reserved, offset, length, _ = _PREAMBLE.unpack_from(data)
    raw = json_bytes(any_json(json.loads(data[offset : offset + length]), rng))
    if rng.random() < 0.1:
        raw = any_bytes(raw, rng)
    digest = hashlib.sha256(raw).digest()
    preamble = _PREAMBLE.pack(magic, version, reserved, offset, len(raw), digest)
    return preamble + data[len(preamble) : offset] + raw


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Place and size of every number in a GGUF header, lengths and types included.

    IndexError where it goes on behind the end, KeyError for an unknown type.
    """
    found: list[tuple[int, int]] = [(4, 4)]
    at = 8

    def number(size: int) -> int:
        nonlocal at
        if at + size > len(data):
            raise IndexError(at)
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)  # it moves the place itself
        at += length

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        else:
            number(_SIZES[kind])

    tensors, pairs = number(8), number(8)
    for _ in range(pairs):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def gguf(places: list[tuple[int, int]]) -> Callable[[bytes, random.Random], bytes]:
    """For a file with numbers at these places: other counts, types, lengths, shapes, offsets."""
    end = places[-1][0] + 8

    def change(data: bytes, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.1:
            return any_bytes(data, rng)
        if kind < 0.2:
            return any_bytes(data[:end], rng) + data[end:]
        # Numbers of arrays are most of a file, those of its tensors stand last.
        few = places[:12] + places[-80:]
        for _ in range(rng.randint(1, 3)):
            data = with_number(data, *rng.choice(few if rng.random() < 0.5 else places), rng)
        return data

    return change


def wheel(members: Mapping[str, bytes]) -> Callable[[bytes, random.Random], bytes]:
    """For a wheel of these members: other names, other contents, another archive."""

    def change(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            # The directory of an archive stands at its end.
            tail = data.rfind(b"PK\x01\x02", 0, len(data) - 60 * rng.randrange(4))
            return data[:tail] + any_bytes(data[tail:], rng) if tail > 0 else any_bytes(data, rng)
        items = list(members.items())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(items))
            name, content = items[at]
            kind = rng.random()
            if kind < 0.15:
                items.append((name, content))
            elif kind < 0.3:
                del items[at]
            elif kind < 0.45:
                odd = ("../x", "/x", "a\0b", "a:b", "é" * 300, f"{name}.part1", name.upper(), "a/")
                items[at] = (rng.choice(odd), content)
            else:
                items[at] = (name, any_bytes(content or b"x", rng))
            if not items:
                break
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in items:
                method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
                archive.writestr(name, content, method)
        return out.getvalue()

    return change
