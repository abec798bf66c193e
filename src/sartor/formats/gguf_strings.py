"""The strings of a GGUF array: a 64-bit length before each, the whole known only by walking it.

A vocabulary has some hundred thousand of them, and every start of a model walks over them all, so
they are found by whole-array operations: six zero bytes and then another byte are the end of a
length below 65,536, unless a string holds zeros. That is a guess, and the lengths prove it: each
must lead exactly to the next. Where they do not, strings are taken one by one.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from sartor.ops.weights import U8

_U64 = struct.Struct("<Q")


def find_strings(data: U8, count: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where the text of the leading strings of ``data`` starts, at most ``count`` of them, and
    where the last of these ends, which may be after ``data``.

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


def read_strings(data: bytes, count: int) -> list[str]:
    """The ``count`` strings that ``data`` is known to hold; U+FFFD for what is not UTF-8."""
    flat = np.frombuffer(data, np.uint8)
    starts, _ = find_strings(flat, count)
    if len(starts) == count:
        # One zero of each length stays, between the texts: all are decoded at once.
        kept = np.ones(len(flat), np.bool_)
        for before in range(2, 9):
            kept[starts - before] = False
        try:
            strings = flat[kept].tobytes().decode("utf-8").split("\0")[1:]
        except UnicodeDecodeError:
            strings = []
        if len(strings) == count:  # else one of them holds a zero, or is not UTF-8
            return strings
    strings = []
    end = 0
    for _ in range(count):
        start = end + 8
        end = start + _U64.unpack_from(data, end)[0]
        strings.append(data[start:end].decode("utf-8", "replace"))
    return strings
