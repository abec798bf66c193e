"""The strings of a GGUF array: a 64-bit length before each, the whole known only by walking it.

A vocabulary has some hundred thousand of them, and every start of a model walks over them all, so
they are found by whole-array operations: six zero bytes and then another byte are the end of a
length below 65,536, unless a string holds zeros. That is a guess, and the lengths prove it: each
must lead exactly to the next. Where they do not, strings are walked one by one.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from sartor.ops.weights import U8

Starts = npt.NDArray[np.int64]

_WINDOW = 1 << 18  # bytes that are looked through at once
_U64 = struct.Struct("<Q")


def find_strings(data: U8, count: int) -> tuple[Starts | None, int]:
    """Where the texts of ``count`` strings start, and where the last of them ends.

    None instead of the starts where the strings had to be walked. The end is after that of
    ``data`` if the strings are.
    """
    found = [np.zeros(0, np.int64)]
    end, left = 0, count
    while left:
        starts, length = _leading(data[end : end + _WINDOW], left)
        if not len(starts):
            return None, _walk(data, end, left)
        found.append(starts + end)
        end += length
        left -= len(starts)
    return np.concatenate(found), end


def _leading(data: U8, count: int) -> tuple[Starts, int]:
    """The starts of the leading strings, at most ``count``, and the end of the last of them.

    It stops before a string that is empty, holds six zeros in a row, is longer than 65,535 bytes or
    has not even its first byte inside ``data``.
    """
    zeros = data == 0
    pairs = zeros[:-1] & zeros[1:]
    fours = pairs[:-2] & pairs[2:]
    sixes = fours[:-2] & pairs[4:]
    starts = np.flatnonzero(sixes[:-1] & ~zeros[6:])[:count] + 6
    if not len(starts) or starts[0] != 8:
        return starts[:0], 0
    ends = starts + data[starts - 8] + (data[starts - 7].astype(np.int64) << 8)
    broken = np.flatnonzero(ends[:-1] + 8 != starts[1:])
    found = broken[0] + 1 if len(broken) else len(starts)
    return starts[:found], int(ends[found - 1])


def _walk(data: U8, at: int, count: int) -> int:
    """The end of ``count`` strings from ``at`` on; after that of ``data`` if a length is."""
    buffer = data.data  # quicker to read from than the array
    try:
        for _ in range(count):
            at += 8 + _U64.unpack_from(buffer, at)[0]
    except (struct.error, OverflowError, IndexError):
        return len(data) + 1
    return at


def read_strings(data: bytes, count: int, starts: Starts | None) -> list[str]:
    """The ``count`` strings of ``data``, with U+FFFD for what is not UTF-8.

    ``starts`` are those that :func:`find_strings` gave for it.
    """
    if starts is not None:
        try:
            strings = _joined(data, starts).tobytes().decode("utf-8").split("\0")[1:]
        except UnicodeDecodeError:
            strings = []
        if len(strings) == count:  # else one of them is not UTF-8, or holds a zero
            return strings
    strings = []
    end = 0
    for _ in range(count):
        start = end + 8
        end = start + _U64.unpack_from(data, end)[0]
        strings.append(data[start:end].decode("utf-8", "replace"))
    return strings


def read_pairs(data: bytes, starts: Starts | None) -> list[tuple[str, str]] | None:
    """Strings of two words with one space between, as pairs; None if one is anything else.

    Making the strings first, and cutting each, takes twice as long.
    """
    if starts is None or not len(starts):
        return None
    joined = _joined(data, starts)
    before, spaces = np.flatnonzero(joined == 0), np.flatnonzero(joined == ord(" "))
    if not len(before) == len(spaces) == len(starts):
        return None
    if np.any(before > spaces) or np.any(spaces[:-1] > before[1:]):
        return None
    joined[before] = ord(" ")
    try:
        words = iter(joined[1:].tobytes().decode("utf-8").split(" "))
    except UnicodeDecodeError:
        return None
    return list(zip(words, words, strict=True))


def _joined(data: bytes, starts: Starts) -> U8:
    """The texts with a zero byte before each: the last of its length."""
    flat = np.frombuffer(data, np.uint8)
    kept = np.ones(len(flat), np.bool_)
    for before in range(2, 9):
        kept[starts - before] = False
    return flat[kept]
