"""A vocabulary as tables that are used in place, from a file beside the packed weights.

Making dictionaries of a hundred thousand strings takes longer than everything else at a start.
A short text needs a few hundred look-ups; here each is a search in a sorted table:

* the text of a token: ``texts[ends[id - 1] : ends[id]]``, UTF-8;
* the id of a text: ``hashes`` holds the CRC-32 of every token in order, ``by_hash`` their ids;
* a merge of two tokens: ``pairs`` holds ``left << 32 | right`` in order, ``ranks`` its place in
  the list of merges, ``joined`` the token that it makes.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload
from zlib import crc32

import numpy as np
import numpy.typing as npt

from sartor.errors import FormatError, SartorError
from sartor.formats.packed import SUFFIX, PackedFile, write_packed

LAYOUT_VERSION = 1
"""Part of a file's name: change it when the tables change."""

_LOG = logging.getLogger(__name__)
_DTYPES = {
    "texts": np.uint8,
    "ends": np.uint32,
    "hashes": np.uint32,
    "by_hash": np.uint32,
    "pairs": np.uint64,
    "ranks": np.uint32,
    "joined": np.uint32,
}
Arrays = dict[str, npt.NDArray[np.generic]]


class Merge(NamedTuple):
    """What two neighbouring tokens become; the lowest rank goes first."""

    rank: int
    token: int


class Vocabulary(Sequence[str]):
    """Token texts by id, ids by text, and merges. ``spaced``: some token spans two words."""

    def __init__(self, arrays: Arrays, spaced: bool) -> None:
        self.arrays = arrays
        self.spaced = spaced
        # Indexing a memoryview gives Python's own integers, several times faster than numpy's.
        self._texts = memoryview(arrays["texts"].data)
        self._ends = memoryview(arrays["ends"].data)
        self._hashes = memoryview(arrays["hashes"].data)
        self._by_hash = memoryview(arrays["by_hash"].data)
        self._pairs = memoryview(arrays["pairs"].data)
        self._ranks = memoryview(arrays["ranks"].data)
        self._joined = memoryview(arrays["joined"].data)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, token: int) -> str: ...
    @overload
    def __getitem__(self, token: slice) -> list[str]: ...
    def __getitem__(self, token: int | slice) -> str | list[str]:
        if isinstance(token, slice):
            return self.of(range(*token.indices(len(self))))
        if not 0 <= token < len(self):
            raise IndexError(token)
        return str(self._raw(token), "utf-8", "surrogatepass")

    def of(self, tokens: Iterable[int]) -> list[str]:
        """The texts of many tokens, by their ids."""
        raw = self._raw
        return [str(raw(token), "utf-8", "surrogatepass") for token in tokens]

    def _raw(self, token: int) -> memoryview:
        return self._texts[self._ends[token - 1] if token else 0 : self._ends[token]]

    def find(self, text: str) -> int | None:
        """The id of a token by its text."""
        raw = text.encode("utf-8", "surrogatepass")
        wanted = crc32(raw)
        at = bisect_left(self._hashes, wanted)
        while at < len(self._hashes) and self._hashes[at] == wanted:
            token = self._by_hash[at]
            if self._raw(token) == raw:
                return token
            at += 1
        return None

    def merge(self, left: int, right: int) -> Merge | None:
        """What two tokens are merged into."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at < len(self._pairs) and self._pairs[at] == pair:
            return Merge(self._ranks[at], self._joined[at])
        return None

    def merges(self) -> list[tuple[str, str]]:
        """All merges in order."""
        tokens = self[:]
        pairs = self.arrays["pairs"][np.argsort(self.arrays["ranks"])].tolist()
        return [(tokens[pair >> 32], tokens[pair & 0xFFFFFFFF]) for pair in pairs]


def make_vocabulary(
    tokens: Sequence[str], merges: Sequence[str] = (), *, spaced: bool = False
) -> Vocabulary:
    """The tables of distinct tokens; ``merges`` are two of them each, with a space between.

    FormatError for a merge of or into what is no token.
    """
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    found: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        try:
            found[ids[left] << 32 | ids[right]] = (rank, ids[left + right])
        except KeyError as unknown:
            raise FormatError(f"{merge!r} speaks of {unknown}, which is no token") from None
    raw = [token.encode("utf-8", "surrogatepass") for token in tokens]
    hashes = np.fromiter(map(crc32, raw), np.uint32, len(raw))
    by_hash = np.argsort(hashes, kind="stable")
    pairs = np.fromiter(found, np.uint64, len(found))
    ranked = np.array(list(found.values()), np.uint32).reshape(-1, 2)
    by_pair = np.argsort(pairs)
    arrays: Arrays = {
        "texts": np.frombuffer(b"".join(raw), np.uint8),
        "ends": np.fromiter(accumulate(map(len, raw)), np.uint32, len(raw)),
        "hashes": hashes[by_hash],
        "by_hash": by_hash.astype(np.uint32),
        "pairs": pairs[by_pair],
        "ranks": np.ascontiguousarray(ranked[by_pair, 0]),
        "joined": np.ascontiguousarray(ranked[by_pair, 1]),
    }
    return Vocabulary(arrays, spaced)


def vocabulary_path(cache: Path, identity: str) -> Path:
    """Where the tables of a checkpoint are kept; another checkpoint has another place."""
    digest = hashlib.sha256(f"vocabulary {LAYOUT_VERSION}\n{identity}".encode()).hexdigest()
    return cache / f"{digest[:40]}{SUFFIX}"


def save_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Writes the file; where that fails, only the next start is slower."""
    meta = {"spaced": vocabulary.spaced, "checksums": _checksums(vocabulary.arrays)}
    try:
        write_packed(path, meta, vocabulary.arrays)
    except SartorError as error:
        _LOG.warning("no vocabulary is kept: %s", error)


def load_vocabulary(path: Path) -> Vocabulary | None:
    """The tables in a file, None where it is absent or damaged in any way.

    They are few megabytes, so all of them are compared with their checksum: a wrong token would
    not be noticed later.
    """
    if not path.exists():
        return None
    try:
        file = PackedFile.open(path)
        # The view gives the numbers their native name, which memoryview wants.
        arrays: Arrays = {
            name: file.array(name).astype(dtype, copy=False).view(dtype)
            for name, dtype in _DTYPES.items()
        }
    except SartorError as error:
        _LOG.warning("%s; making it again", error)
        return None
    if file.meta.get("checksums") != _checksums(arrays):
        _LOG.warning("%s: the vocabulary is damaged; making it again", path)
        return None
    return Vocabulary(arrays, file.meta.get("spaced") is True)


def _checksums(arrays: Arrays) -> list[list[int]]:
    return [[arrays[name].size, crc32(arrays[name].view(np.uint8).data)] for name in _DTYPES]
