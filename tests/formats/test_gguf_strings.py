"""Strings found by whole-array operations are those that a walk from length to length finds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from sartor.formats.files import MappedFile
from sartor.formats.gguf import read_header
from sartor.formats.gguf_strings import find_strings, read_pairs, read_strings

PLAIN = [b"a", "\u0120the".encode(), b"\xff", "\U0001f600".encode() * 60, b" ", b"0" * 127]
CASES = {
    "none": [],
    "plain": PLAIN,
    "many": [str(i).encode() for i in range(60_000)],  # more than one window
    "lengths": [b"x" * n for n in (1, 7, 8, 255, 256, 257, 511, 512, 65_535)],
    "long": [b"a", b"x" * 65_536, b"b"],
    "longer than a window": [b"a", b"x" * 300_000, b"b"],
    "empty": [b"a", b"", b"b"],
    "all empty": [b"", b""],
    "empty last": [b"a", b""],
    "zeros": [b"a", b"\0", b"b\0c", b"\0" * 7],
    "looks like a length": [b"a", b"b\x02" + bytes(7) + b"zz", b"c"],
    "invalid": [b"a", b"\xe2\x82", b"\xac"],
}


def stored(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in strings)


@pytest.mark.parametrize("strings", CASES.values(), ids=CASES)
def test_strings_are_those_of_a_walk(strings: list[bytes]) -> None:
    data = stored(strings)
    followed = np.frombuffer(data + b"\x05" + bytes(7) + b"after", np.uint8)
    starts, end = find_strings(followed, len(strings))
    assert end == len(data)
    if starts is not None:
        at = 0
        for start, text in zip(starts, strings, strict=True):
            assert start == at + 8
            at = int(start) + len(text)
    expected = [text.decode("utf-8", "replace") for text in strings]
    assert read_strings(data, len(strings), starts) == expected
    assert read_strings(data, len(strings), None) == expected


def test_a_vocabulary_needs_no_walk() -> None:
    for name in ("plain", "many", "lengths"):
        starts, _ = find_strings(np.frombuffer(stored(CASES[name]), np.uint8), len(CASES[name]))
        assert starts is not None, name


@pytest.mark.parametrize("cut", range(1, 30))
def test_strings_that_go_on_after_the_data_end_after_it(cut: int) -> None:
    data = np.frombuffer(stored([b"ab", b"cdefgh", b"ijk"])[:-cut], np.uint8)
    assert find_strings(data, 3)[1] > len(data)


def test_a_length_of_nearly_everything_is_no_place_in_the_data() -> None:
    for length in (1 << 31, (1 << 63) - 1, (1 << 64) - 1):
        data = np.frombuffer(stored([b"ab"]) + struct.pack("<Q", length) + b"c", np.uint8)
        assert find_strings(data, 2)[1] > len(data)


def test_random_bytes_are_walked_alike() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = random.integers(0, 12, 8)
        strings = [random.integers(0, 3, n, dtype=np.uint8).tobytes() for n in sizes]
        data = stored(strings)
        starts, end = find_strings(np.frombuffer(data, np.uint8), len(strings))
        assert end == len(data)
        expected = [text.decode("utf-8", "replace") for text in strings]
        assert read_strings(data, len(strings), starts) == expected


def pairs(strings: list[bytes]) -> list[tuple[str, str]] | None:
    data = stored(strings)
    return read_pairs(data, find_strings(np.frombuffer(data, np.uint8), len(strings))[0])


def test_pairs_are_the_words_of_each_string() -> None:
    assert pairs([b"a b", "\u0120t he".encode(), b"x y"]) == [
        ("a", "b"),
        ("\u0120t", "he"),
        ("x", "y"),
    ]
    assert pairs([b" b", b"a "]) == [("", "b"), ("a", "")]


@pytest.mark.parametrize(
    "strings",
    [
        [b"a b c", b"d"],
        [b"d", b"a b c"],
        [b"a b", b"cd"],
        [b"a b c"],
        [b"a \xff"],
        [b"a\0b c d"],
        [],
    ],
)
def test_anything_else_gives_no_pairs(strings: list[bytes]) -> None:
    assert pairs(strings) is None


@pytest.mark.parametrize("strings", [[b"a b", b"c d"], [b"a b", b"c"], []])
def test_metadata_gives_pairs_or_strings(strings: list[bytes], tmp_path: Path) -> None:
    key = b"tokenizer.ggml.merges"
    count = struct.pack("<Q", len(strings))
    value = struct.pack("<II", 9, 8) + count + stored(strings)  # an array of strings
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + stored([key]) + value + bytes(32))
    metadata = read_header(MappedFile.open(path)).metadata
    words = [tuple(text.decode().split(" ")) for text in strings]
    expected = words if words and all(len(word) == 2 for word in words) else None
    assert metadata.pairs(key.decode()) == expected
    assert metadata[key.decode()] == [text.decode() for text in strings]
    assert metadata.pairs("another") is None
